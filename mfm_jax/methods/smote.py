"""SMOTE in feature space, by imbalanced-learn."""

import numpy as np


def oversample(features: np.ndarray, labels: np.ndarray, neighbors: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns features with synthetic ones added until every class has as many as the largest.

    A synthetic example lies at random between one of its class and one of that one's nearest neighbours in the class.
    A class of n images has n - 1 neighbours at most; the single image of a class is repeated.

    `features` are float32 [N, C], `labels` int32 [N]; the given ones come first, K n_max in all. `seed` is of the
    interpolation.

    References:
      Chawla et al., SMOTE: synthetic minority over-sampling technique, JAIR 2002. In the feature space of a trained
      network, as for classifier retraining (Kang et al. 2020), it is this project's adaptation.
    """
    from imblearn.over_sampling import SMOTE

    counts = np.bincount(labels)
    most = counts.max()
    new_features, new_labels = [features], [labels]
    for k in np.flatnonzero((counts > 0) & (counts < most)):
        own = features[labels == k]
        if len(own) == 1:
            added = np.repeat(own, most - 1, axis=0)
        else:
            # The class against a stand-in for the rest, which only says how many are wanted.
            rest = np.zeros((most, features.shape[1]), features.dtype)
            pair = np.concatenate([rest, own]), np.repeat([0, 1], [most, len(own)])
            smote = SMOTE(k_neighbors=min(neighbors, len(own) - 1), random_state=seed + int(k))
            added = smote.fit_resample(*pair)[0][most + len(own) :]
        new_features.append(added.astype(features.dtype))
        new_labels.append(np.full(len(added), k, labels.dtype))
    return np.concatenate(new_features), np.concatenate(new_labels)
