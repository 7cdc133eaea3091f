"""Rules and history: they are tried on it before they are put in force, and applied to it afterwards where that is asked."""
