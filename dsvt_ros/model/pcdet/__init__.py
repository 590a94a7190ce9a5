"""OpenPCDet's descriptions of DSVT models, read into ours.

Two generations are read: that of the DSVT release (Haiyang-W/DSVT), a fork of OpenPCDet, and that of OpenPCDet itself,
which took DSVT over later. Whatever the networks here cannot do the same way is refused by name.
"""
