"""`python -m launch`: the command line where the script is not on the path, e.g. inside a Ray job."""

from grpo_ray.entry import main

main()
