"""Files of weights as material: what the tools do that merge, resize, extract, convert and verify them."""
