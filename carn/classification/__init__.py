"""Is tissue in super-resolved pictures still recognised: a classifier on GT, LR and SR crops."""
