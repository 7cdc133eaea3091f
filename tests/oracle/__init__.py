"""What must come out, worked out another way: brute force over orders, marts in SQL, messages that break the contract."""
