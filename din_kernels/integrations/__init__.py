"""Adapters for the DIN modules of other libraries; see ``din_kernels.convert``.

One file per library, imported only when a model holds a module of that library. Each has ``ADAPTERS``: the library's class ->
``Adapter``. A fused class *derives from* the library's own and overrides ``forward`` alone, so converting an instance is
``module.__class__ = fused``: parameters, buffers, ``state_dict`` keys, hooks and references to the module stay as they are,
``isinstance`` still holds, and going back is the same assignment.
"""
