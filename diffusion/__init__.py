"""The DDPM: specs, schedule, model, training, sampling, audit and evaluation features.

Submodules are imported explicitly (`from diffusion.training import train`). Neither this package
nor `diffusion.spec` imports torch, so that a process which only reads plans stays small.
"""
