"""Other systems' encodings: plain torch seals and reads them, so serving them is slow."""
