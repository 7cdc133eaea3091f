"""What the raw tables of the warehouse have to be before anything is built on them."""
