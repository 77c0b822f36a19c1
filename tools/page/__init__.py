"""What the pages of reports are made of: their frame, and charts."""
