"""What a person looks at: HTML pages with pictures."""
