"""Small feature networks for FID and KID, pinned by hash, trained on images that no silo gets.

| name          | input | file    | trained on               | accuracy there | on silos' images  |
|---------------|-------|---------|--------------------------|----------------|-------------------|
| digits        | 8×8   | 201 kB  | 297 held-out digits      | 100.0 %        | 97.9 % of 1,500   |
| fashion-mnist | 28×28 | 259 kB  | the 10,000 test images   | 91.9 %         | 89.8 % of 10,000  |

Measured by `python -m diffusion.features.train`, which made the files. Images of any size are
resized to the input. A study of other images brings a network of its own, in a file of the same
architecture (`file.py`) that `concilium feature-network` trains. These are small classifiers, not
Inception: figures made with different networks never share a table.
"""
