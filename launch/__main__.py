"""`python -m launch`: the command line where the script is not on the path, e.g. inside a Ray job."""

from launch.entry import main

main()
