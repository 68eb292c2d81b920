"""What Hanse's HTML pages share: templates in two languages, one theme, and the safety of pages that are served."""
