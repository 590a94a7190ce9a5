"""The networks as `nn.Module`s with published state-dict keys, and the files that describe and fill them."""
