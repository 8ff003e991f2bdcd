"""The passes: functions from one verified program to the next, imported as `gimli_compile.passes`."""

if __name__ != "gimli_compile.passes":
    raise ImportError(f"`{__name__}` is no package of its own: write `import gimli_compile.passes` for this folder")
