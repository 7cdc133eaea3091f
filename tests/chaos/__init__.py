"""What must survive: kills at random points, servers that crash and come back."""
