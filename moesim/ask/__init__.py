"""From options, wherever they are written, to what is asked of the simulator."""
