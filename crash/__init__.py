"""Merges that are killed, starved and crossed: whatever happens, OUT is absent, old or new.

The product holds no hooks for this.  strace kills it, or lets one of its system calls fail, at a chosen call;
then the disk is looked at, and the same command must end in the bytes of an undisturbed run.
"""
