"""Text for training and measuring: documents read from files, tokenised once, packed into blocks of one length."""
