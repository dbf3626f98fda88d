"""Models that torch.export wrote: reads .pt2 files without running what they hold, and lifts programs to nn.Modules.

`load_exported` is for files, `exported` for a module that capture refuses.
"""
