"""What methods are composed of: branches by role or by task, and penalties. The methods are in the folder above."""
