"""CKA: which layers of two models represent a text alike."""
