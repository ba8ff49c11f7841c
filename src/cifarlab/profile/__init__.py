"""What a network costs: multiply-adds counted on the meta device, seconds measured on this machine."""
