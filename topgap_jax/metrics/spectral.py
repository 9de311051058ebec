"""Groups among points: spectral clustering with the number of groups from the eigengap, NumPy and SciPy alone."""

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.linalg import eigh
from scipy.spatial.distance import cdist

NEIGHBOURS = 10
MOST = 8  # groups
JOINED = 0.1  # the largest eigenvalue of a group: with more, too many edges lead out of it


def spectral_clusters(points: np.ndarray, neighbours: int = NEIGHBOURS, most: int = MOST) -> np.ndarray:
    """The group (n,) of each of the points (n, d), 0 the largest; all 0 where the eigengap finds one group.

    The graph joins each point with its `neighbours` nearest (Euclidean) and where one is a neighbour of the other; of
    its normalised Laplacian I - D^-1/2 W D^-1/2 with eigenvalues l_1 <= l_2 <= ... the number of groups is the k of the
    largest gap l_{k+1} - l_k, k at most `most`, among those with l_k <= .1: what varies smoothly, such as where objects
    stand, has gaps too, but no groups that few edges join (l_2 / 2 is a lower bound of the conductance). k-means in the
    rows of D^-1/2 U, U the first k eigenvectors (Ng et al. 2002; von Luxburg 2007, arXiv 0711.0189), from the points
    farthest from each other: the same groups every time.
    """
    points = np.asarray(points, np.float64)
    if len(points) < 3:
        return np.zeros(len(points), int)
    values, vectors, degree = spectrum(points, neighbours)
    k = eigengap(values, most)
    if k == 1:
        return np.zeros(len(points), int)
    rows = vectors[:, :k] / np.sqrt(degree)[:, None]
    _, groups = kmeans2(rows, farthest_points(rows, k), minit="matrix", iter=100, missing="warn")
    order = np.argsort(-np.bincount(groups, minlength=k), kind="stable")
    return np.argsort(order)[groups]


def spectrum(points: np.ndarray, neighbours: int = NEIGHBOURS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(eigenvalues (n,) ascending, eigenvectors (n, n), degrees (n,)) of the graph's normalised Laplacian.

    >>> spectrum(np.array([[0], [0.1], [0.2], [3], [3.1], [3.2]]), 2)[0].round(6).clip(0).tolist()
    [0.0, 0.0, 1.5, 1.5, 1.5, 1.5]
    """
    n = len(points)
    distances = cdist(points, points)
    np.fill_diagonal(distances, np.inf)  # no point is a neighbour of itself, also among equal ones
    nearest = np.argsort(distances, 1, kind="stable")[:, : min(neighbours, n - 1)]
    graph = np.zeros((n, n))
    np.put_along_axis(graph, nearest, 1, 1)
    graph = np.maximum(graph, graph.T)
    degree = graph.sum(1)
    root = 1 / np.sqrt(degree)
    values, vectors = eigh(np.eye(n) - root[:, None] * graph * root)
    return values, vectors, degree


def eigengap(values: np.ndarray, most: int = MOST) -> int:
    """The number k of eigenvalues, at most `most` and none above .1, before the largest gap; of equal gaps the first.

    >>> eigengap(np.array([0, 0, 1.5, 1.5])), eigengap(np.array([0, 0.3, 0.4, 1.5]))
    (2, 1)
    """
    most = min(most, len(values) - 1, int((values <= JOINED).sum()))
    gaps = np.diff(values[: most + 1])
    return 1 + int(np.argmax(np.round(gaps, 9)))


def farthest_points(points: np.ndarray, k: int) -> np.ndarray:
    """k of the points (n, d): the one farthest from the mean, then each the farthest from those before."""
    distance = np.linalg.norm(points - points.mean(0), axis=1)
    chosen = [int(distance.argmax())]
    nearest = np.linalg.norm(points - points[chosen[0]], axis=1)
    for _ in range(k - 1):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return points[chosen]


def adjusted_rand_index(a: np.ndarray, b: np.ndarray) -> float:
    """How far two groupings (n,) agree: 1 the same, 0 as much as by chance (Hubert & Arabie 1985).

    >>> round(adjusted_rand_index([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]), 6)
    0.324324
    """
    pairs = lambda counts: float((counts * (counts - 1) / 2).sum())
    first, second = (np.unique(values, return_inverse=True)[1].ravel() for values in (a, b))
    both = np.bincount(first * (second.max() + 1) + second)
    within = pairs(np.bincount(first)), pairs(np.bincount(second))
    chance = within[0] * within[1] / pairs(np.array([len(first)])) if len(first) > 1 else 0.0
    largest = sum(within) / 2
    return 1.0 if largest == chance else (pairs(both) - chance) / (largest - chance)
