"""The shop's products with their reference photos: a SQLite database is the truth, and an index beside it finds fast.

The package knows no torch: vectors come from whoever embeds. See `hanse_client.gallery.gallery`.
"""
