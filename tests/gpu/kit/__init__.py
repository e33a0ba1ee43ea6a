"""The checks of a GPU on a bare machine: Python 3.12, torch 2.11 for CUDA 13, an H100 or H200, no network, at most 64 MiB a call.

    make gpu-kit                          here: packs what such a machine lacks, into .kit/
    bash tests/gpu/kit/run.sh 1           there, with this repository and .kit/call-1.tar.xz: learner, ZeRO, engine, sampling
    bash tests/gpu/kit/run.sh 2           there, with .kit/call-2.tar.xz: Ray, tests/gpu and tests.bench.gpu

`python -m tests.gpu.kit.bare 1|2 MODULE` runs a module here with nothing but what is there or carried.

Call 2 needs what call 1 has unpacked. Each check is a process with a deadline of its own; its figures are lines of
$OUT/results.jsonl from the moment that they are known. 15 minutes hold both calls. Call 1 is 56 MiB with vLLM 0.32.
"""
