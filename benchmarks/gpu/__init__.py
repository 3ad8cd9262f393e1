"""What a GPU says: everything that is to be checked and measured on one, in minutes, by one command (`__main__.py`)."""
