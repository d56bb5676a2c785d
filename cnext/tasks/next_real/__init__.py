"""The suite `next-real`: six tasks on real pictures, words in real fonts and handwritten digits."""
