"""One module for each framework; importing one needs that framework."""
