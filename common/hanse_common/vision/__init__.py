"""The recognizer: public frozen backbone, trained head, and how a photo becomes numbers."""
