"""Benchmarks: attnhub's backends beside the naive maths and torch's own kernels, interleaved in one process.

`cases` and `presets` say what is timed, `peers` who takes part, `measure` how, `results` what is kept, `targets` what is asked of it, `plot` and
`pages` how it is shown.
``attnhub bench`` is the program.
"""
