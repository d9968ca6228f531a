"""What may be known of a device while compiling for it. Facts only."""
