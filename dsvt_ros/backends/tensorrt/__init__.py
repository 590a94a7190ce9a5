"""Both networks as TensorRT engines, from release 8.5 to 11.

`load` finds the engines of a model, `cache` keeps them, `build` makes them in a child process (`child`), `runner` runs
them, and `api` is what all of them know about TensorRT itself. TensorRT's classes are only known at run time: objects
of them carry annotations, which a test resolves against the bindings of several releases.
"""
