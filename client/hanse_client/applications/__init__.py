"""What a shop does with a recognizer and a gallery: each module is one application, over `Recognition` alone."""
