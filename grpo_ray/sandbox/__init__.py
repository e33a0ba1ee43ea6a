"""Running untrusted programs. bubblewrap isolates, libseccomp filters, rlimits bound; without all three the sandbox refuses to run.

What a program gets, and what enforces it:

    other processes       a process namespace of its own; nothing of the host's in /proc, and nothing to signal
    network               a network namespace without interfaces; the filter refuses every socket but a Unix pair
    files                 an empty read-only root with /usr and the interpreter, read-only; /tmp and /dev/shm, `disk_mb` together;
                          no home, no /etc, no /sys, no device beyond null, full, random, urandom
    environment           PATH, HOME=/tmp, LANG and one thread for OpenMP; bwrap itself starts with an empty one
    privileges            none: no capability, no_new_privs, no namespace of its own; under root a user of its own (nobody)
    kernel surface        the filter refuses what no ordinary program calls (`isolation.REFUSED`), and whatever is newer than Linux
                          6.6
    CPU                   RLIMIT_CPU: `cpu_s` for each process of each test
    time                  `timeout_s` from the first test to the last: the parent kills the namespace's first process,
                          and with it Linux kills everything in it, sessions and orphans alike
    memory                RLIMIT_AS: `memory_mb` for a process. RLIMIT_NPROC, which counts in the user namespace: at most
                          `processes` processes and threads, so never more than the product; and a sandbox with more than
                          `memory_mb` in all of them, measured every WATCH_S, is killed. The measure counts pages, and each pipe
                          and socket as full
    memory of no process  the filter refuses shared memory without a file, huge pages, memory files, System V memory, message
                          queues, terminals, io_uring, attributes of files, and larger buffers of sockets and pipes; more than
                          MAX_LOCKS locks when measured, and it is killed. Files in /tmp and /dev/shm count as `disk_mb`
    files' size, number   RLIMIT_FSIZE: `file_mb` for each file, standard output too; the size of /tmp; RLIMIT_NOFILE; more than
                          MAX_FILES files when measured, and it is killed
    after its end         the sandbox's files are in its memory, and its processes in its namespace: both are gone with it

A sandbox that can't be measured is ended, and `trial` tries each limit before anything else runs. Not bounded: the kernel's own
tables of a process (page tables, maps, descriptors), some 20 MiB each at worst.

Read `isolation`, which builds a sandbox, `trial`, which tries it, `box`, one sandbox, `watch`, which measures it, `inside`, which
runs in it, and `remote`, which lets tests in one sandbox call a program in another: no program ever shares a process, or a file
system, with the answers that it is judged by. `verifier` keeps third-party code in a long-lived sandbox, to judge many texts.

This package imports only the modules at the root of `grpo_ray`.
"""
