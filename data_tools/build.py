"""`python -m data_tools.build data=NAME`: raw material into indexed shards, by the recipe called NAME."""

if __name__ == "__main__":  # processes that render import this module too, and need none of what follows
    from data_tools.command import run_command
    from data_tools.recipes import build_and_print

    run_command(build_and_print)
