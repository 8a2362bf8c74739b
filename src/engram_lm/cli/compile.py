"""The command that compiles kernels beforehand."""

from engram_lm.cli.app import Flag, app


@app.command(name="compile")
def compile_(*, json: Flag = False) -> None:
    """Compile all usual kernels for this machine now, so that no later command waits. Takes up to a minute, once.

    They are found by everybody who may read where they are kept: $NUMBA_CACHE_DIR where it is set, else beside the package,
    or where that cannot be written $ENGRAM_CACHE/kernels or ~/.cache/engram-lm/kernels.

    Parameters
    ----------
    json
        Print JSON.
    """
    from engram_lm.compiling.command import compile_command

    compile_command(as_json=json)
