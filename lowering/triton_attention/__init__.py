"""Attention in Triton, for GPUs from sm_80 on: split over tokens, over tiered keys and values.

`launch.run` reads remote tokens in place, within the window, and is meant for few queries. The
forward in `forward.py` attends to tokens that lie in device memory, under any mask that positions
give. Device functions are in `device.py`, `decode.py` and `merge.py`.
"""
