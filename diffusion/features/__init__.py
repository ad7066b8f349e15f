"""Small feature networks for FID and KID, pinned by hash, trained on images that no silo gets.

| name | data | trained on | accuracy on images it never saw |
|---|---|---|---|
"""
