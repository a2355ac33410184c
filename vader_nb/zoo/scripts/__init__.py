"""The scripts that trained the embedded models (`make zoo`). They are kept out of the wheel."""
