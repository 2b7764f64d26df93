"""Wrong answers that somebody might give: {lesson: {exercise: {answer: words with which the check must say what is
wrong}}}."""

WRONG = {
    "core/basics": {
        1: {"answer = 32 * 49": "bias", "answer = 32 * 16 * 49 + 32": "without groups"},
        2: {"def linear_macs(tokens, n, m): return n * m": "the counter says 140, and yours 28",
            "def linear_macs(tokens, n, m): return tokens * (n * m + m)": "for 1 tokens from 6 to 9"},
        3: {"""
def dead_share(model, x, name):
    with Capture(model, name) as acts: model(x)
    return (acts[name] <= 0).float().mean()""": "a linear layer puts out no exact zeros",
            """
def dead_share(model, x, name):
    with Capture(model, name) as acts: model(x)
    return (acts[name] == 0).sum()""": "yours says",
            """
def dead_share(model, x, name):
    kept = []
    model.get_submodule(name).register_forward_hook(lambda module, inputs, out: kept.append(out))
    model(x)
    return (kept[0] == 0).float().mean()""": "a hook is left behind"},
    },
    "core/figures": {
        1: {"answer = 49 * 0.5 + 0.4": "that is with numbers", "answer = 49 * 0.16": "it is not 7.84"},
        2: {"def colors_first(x): return torch.as_tensor(x)": "a picture of (3, 5, 4) comes back as (5, 4, 3)",
            "def colors_first(x): return torch.as_tensor(x).permute(2, 1, 0)": "comes back as (3, 4, 5)",
            "def colors_first(x): return torch.as_tensor(x).permute(2, 0, 1).flip(0)": "the picture another"},
        3: {"def contrast(color): return 21 - 20 * sum(color) / 3": "middle grey has 3.98, and yours 11",
            """
def contrast(color):
    luminance = 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2]
    return 1.05 / (luminance + 0.05)""": "middle grey has 3.98, and yours 1.91",
            """
def contrast(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055)**2.4 for c in color]
    return 1.05 / (sum(linear) / 3 + 0.05)""": "red has 4.00, and yours 2.74"}},
    "models/kernels": {
        1: {"answer = 8": "reads two tensors", "answer = 4": "they also read"},
        2: {"def grad_s(x, g): return (g * x * x).sum()": "autograd finds",
            "def grad_s(x, g): return g * F.relu(x) * x": "yours has 50"},
        3: {"def relu_of(y, s, b): return ((y - b) / s).clamp_min(0)": "it is not relu(x)",
            "def relu_of(y, s, b): return (y / s).sqrt()": "not a number"},
    },
    "core/errors": {
        1: {"answer = 1": "not in the same order", "answer = 0.5": "it is more than 0.500"},
        2: {"answer = ['a', 'a', 'b']": "is the second, or equal to the first",
            "answer = ['a', 'b', 'c']": "0 names change",
            "answer = ['a', 'b', 'a']": "equal to the first"},
        3: {"def look_up(name, table): return table[name]": "names nothing that is near",
            "def look_up(name, table): return table.get(name)": "it gives None",
            """
def look_up(name, table):
    if name not in table: raise ValueError('no such key')
    return table[name]""": "does not name the nearest"},
    },
    "core/files": {
        1: {"answer = 0": "would be empty", "answer = 4": "after the last byte"},
        2: {"answer = 0.5": "half of the number", "answer = 0.01": "it is more than 0.010"},
        3: {"def append(path, row): write_atomically(path, lambda file: file.write(as_csv([row], list(row)).encode()))":
                "two rows were added",
            """
def append(path, row):
    new = not path.exists()
    with open(path, 'a') as file:
        file.write(('epoch,top1' if new else '') + f"{chr(10)}{row['epoch']},{row['top1']}")""": "the old file itself"},
    },
    "models/layers": {
        1: {"answer = 2 / 3": "the second moment is 0.6", "answer = 0.8944": "the second moment is 1.2"},
        2: {"def fold(star, fc): return star.scale * fc.weight, star.bias.expand(3)": "the bias is off",
            "def fold(star, fc): return fc.weight, star.bias * fc.weight.sum(1)": "the weight is off"},
        3: {"""
class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
    def forward(self, x): return self.weight * x / x.square().mean(-1, keepdim=True).sqrt()""": "size 0.001",
            """
class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps
    def forward(self, x): return self.weight * x / (x.var(-1, keepdim=True) + self.eps).sqrt()""": "size 1",
            """
class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(dim)), eps""": "['scale']"},
    },
    "models/mixers": {
        1: {"answer = 3": "9 tokens", "answer = 49": "tokens hear", "answer = 8": "even window"},
        2: {"answer = {'Identity', 'RandomMixing'}": "1 missing",
            "answer = {'Identity', 'RandomMixing', 'Pooling', 'SepConv'}": "SepConv is not linear",
            "answer = 'Pooling'": "the names are Identity"},
        3: {"""
class ShiftMixer(nn.Module):
    def __init__(self, dim): super().__init__()
    def forward(self, x):
        a, b, c, d = x.chunk(4, dim=-1)
        return torch.cat([a.roll(-1, 2), b.roll(1, 2), c.roll(1, 1), d.roll(-1, 1)], dim=-1)""":
                "quarter 1 is not what comes from the token left",
            """
class ShiftMixer(nn.Module):
    def __init__(self, dim): super().__init__()
    def forward(self, x): return torch.cat([x.roll(1, 2), x.roll(-1, 2), x.roll(1, 1), x.roll(-1, 1)], dim=-1)""":
                "came out"},
    },
    "models/block": {
        1: {"answer = 8": "it is heard after 7 already", "answer = 3": "after 3 it is not heard"},
        2: {"def parallel(block, x): return block(x)": "this is the block",
            "def parallel(block, x): return block.token_mixer(block.norm1(x)) + block.mlp(block.norm2(x))":
                "x itself is not"},
        3: {"""
class GatedMlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.gate, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.act = StarReLU()
    def forward(self, x): return self.fc2(self.act(self.fc1(x)) * self.gate(x))""": "'fc1.bias'",
            """
class GatedMlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.gate = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.fc2, self.act = nn.Linear(2 * dim, dim, bias=False), StarReLU()
    def forward(self, x): return self.fc2(self.fc1(x) * self.gate(x))""": "the activation is missing",
            """
class GatedMlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.gate = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.fc2, self.act = nn.Linear(2 * dim, dim, bias=False), StarReLU()
    def forward(self, x): return self.fc2(self.act(self.fc1(x)) * self.act(self.gate(x)))""": "it does not compute"},
    },
    "models/card": {
        1: {"answer = 2": "an image has two sides", "answer = 8": "too much"},
        2: {"def frozen(grids, depths): return sum((h * w)**2 for h, w in grids)": "for (96, 64) pixels",
            "def frozen(grids, depths): return sum(depth * h * w for (h, w), depth in zip(grids, depths))":
                "for 64 pixels"},
        3: {"def where(model, share): return [i for i, row in enumerate(stage_table(model), 1) if row['parameters'] >= "
            "5e6]": "for a share of 0.05",
            """
def where(model, share):
    rows = stage_table(model)
    return [i for i, row in enumerate(rows, 1) if row['parameters'] >= share * rows[-1]['parameters']]""":
                "for a share of"},
    },
    "models/metaformer": {
        1: {"answer = 2": "too little", "answer = 16": "too much"},
        2: {"answer = 9": "do not round down", "answer = 4": "one side", "answer = (100 / 32)**2": "it is not 9.7"},
        3: {"answer = MetaFormer(token_mixers=('Attention', 'Attention', 'Pooling', 'Pooling'), dims=(32, 64, 96, "
            "128), num_classes=10)": "its mixers are",
            "answer = MetaFormer(token_mixers=('Pooling', 'Pooling', 'Attention', 'Attention'), num_classes=10)":
                "parameters",
            "answer = MetaFormer(token_mixers=('Pooling', 'Pooling', 'Attention', 'Attention'), depths=(1, 1, 1, 1), "
            "dims=(32, 64, 96, 128))": "1000 classes"},
    },
    "models/weights": {
        1: {"answer = 'stages.2.downsample.conv.bias'": "a name of timm",
            "answer = 'downsample_layers.3.conv.bias'": "it is not downsample_layers.3",
            "answer = 'stages.2.0.conv.bias'": "all downsamplings in downsample_layers"},
        2: {"def kept_probabilities(p, rows): return p[:, rows]": "do not add up to 1",
            "def kept_probabilities(p, rows): return p[:, rows].softmax(1)":
            "says something else",
            "def kept_probabilities(p, rows): return p / p[:, rows].sum(1, keepdim=True)": "4 classes"},
        3: {"def soup(a, b): return read_weights(a)": "is not the mean", """
def soup(a, b):
    a, b = read_weights(a), read_weights(b)
    return {name: a[name] + b[name] for name in a}""": "is not the mean", "def soup(a, b): return {}": "its names"},
    },
    "models/registry": {
        1: {"answer = 'caformer_s18'": "2 with fewer than 30 million are better",
            "answer = 'caformer_s36_in21ft1k'": "39.3 million",
            "answer = 'caformer_s18_384'": "not measured at 224", "answer = 'CAFormer-S18'": "none of the 55"},
        2: {"def mixer_params(dim): return 4 * dim**2 + 98 * dim, 4 * dim**2":
                "SepConv has 22,658 parameters, and yours 22,656",
            "def mixer_params(dim): return 4 * dim**2 + 98 * dim + 2, 3 * dim**2": "Attention has"},
        3: {"answer = create_model('caformer_s18')": "its mixers are",
            "answer = create_model('caformer_s18', token_mixers=('Pooling', 'Pooling', 'Attention', 'Attention'))":
                "start from poolformerv2_s12"},
    },
    "data/shapes": {
        1: {"answer = 40": "sides apart, not 40", "answer = 0.5": "32.0 pixels apart"},
        2: {"answer = 0.5": "is right in more", "answer = 1.": "none is right"},
        3: {"def diamond(x, y): return abs(x) + abs(y) - np.sqrt(np.pi / 2)": "a step of one away",
            "def diamond(x, y): return (abs(x) + abs(y) - 1) / np.sqrt(2)": "its area is 1.98",
            "def diamond(x, y): return np.maximum(abs(x), abs(y)) - np.sqrt(np.pi) / 2": "it must stand on a corner"},
    },
    "data/transforms": {
        1: {"answer = dict(auto_augment=None, re_prob=0)": "30 pictures, not two",
            "answer = dict(auto_augment=None, re_prob=0, scale=(1, 1), ratio=(1, 1), train_interpolation='bicubic', "
            "hflip=0)":
                "the mirror is off, too",
            "answer = dict(auto_augment=None, re_prob=0, scale=(1, 1), ratio=(1, 1))": "not two"},
        2: {"answer = 3 / 16": "each is applied half of the time", "answer = 1 / 32": "is too little",
            "answer = 3 / 8": "it is not 0.375"},
        3: {"""
class Noise:
    def __init__(self, std): self.std = std
    def __call__(self, image):
        always = torch.Generator().manual_seed(0)
        return image + self.std * torch.randn(image.shape, generator=always)""": "change from epoch to epoch",
            """
class Noise:
    def __init__(self, std): self.std = std
    def __call__(self, image):
        torch.seed()
        return image + self.std * torch.randn_like(image)""": "it must repeat itself",
            """
class Noise:
    def __init__(self, std): self.std = std
    def __call__(self, image): return image + self.std * torch.rand_like(image)""":
                "add noise of that standard deviation"}
    },
    "data/folders": {
        1: {"answer = [0, 1, 2, 3, 4, 5]": "in place 4", "answer = [0, 1, 2, 3, 0, 1]": "in place 5",
            "answer = [0, 1, 2, 3]": "has 4 places"},
        2: {"answer = (1, 1)": "in this val/ their label is not 1", "answer = (0, 0)": "in train/ their label is not 0",
            "answer = (1, 0)": "is not 1"},
        3: {"def class_counts(images): return {name: len(images) // 2 for name in images.classes}":
                "there are 11 of china",
            "def class_counts(images): return {y: images.targets.count(y) for y in images.targets}":
                "names of the classes"},
    },
    "data/public": {
        1: {"answer = 73": "divide by 255", "answer = 0.31": "too far off"},
        2: {"answer = 'Shoe'": "no class", "answer = 'Bag'": "another class differs more"},
        3: {"def few(labels, n): return list(range(n))": "1 and 1 pictures",
            "def few(labels, n): return [4, 5, 3, 6]": "does not ascend",
            "def few(labels, n): return [3, 4, 5, 6]": "not the first ones"},
    },
    "data/photographs": {
        1: {"answer_1 = (380, 0, 512, 200)": "the network says", "answer_1 = (300, 0, 600, 212)": "does not lie in"},
        2: {"answer_2 = (0, 1)": "becomes -1", "answer_2 = (-1, 0.5)": "a white photograph becomes 1"},
        3: {"def with_mirror(model, x): return (model(x) + model(x.flip(-1))).div(2).softmax(-1)":
                "the softmax of the mean",
            "def with_mirror(model, x): return model(x).softmax(-1)": "left and right change places"},
    },
    "data/datasets": {
        1: {"answer = 64": "it has 2×2, too", "answer = 24": "the last grid has 1×1 tokens",
            "answer = 128": "has 4×4 tokens"},
        2: {"answer = {'shape'}": "same keeps its labels", "answer = {'shape', 'same', 'texture'}": "a falling one",
            "answer = {'shape', 'same', 'order'}": "anticlockwise in a mirror",
            "answer = {'shape', 'sane'}": "no tasks"},
        3: {"""
def load_halves(img_size=64, seed=0, augment=True):
    images = [(torch.zeros(3, img_size, img_size), i % 2) for i in range(30)]
    same = lambda x: x
    info = DataInfo('x', ['left', 'right'], img_size)
    return ImageDataset(images[:20], same), ImageDataset(images[20:], same), info""":
                "the white half is not",
            """
def load_halves(img_size=64, seed=0, augment=True):
    images = [(torch.zeros(3, 64, 64), i % 2) for i in range(30)]
    same = lambda x: x
    return ImageDataset(images[:20], same), ImageDataset(images[20:], same), DataInfo('x', ['left', 'right'], 64)""":
                "not (3, 32, 32)",
            """
def load_halves(img_size=64, seed=0, augment=True):
    images = [(torch.zeros(3, img_size, img_size), 0) for i in range(30)]
    same = lambda x: x
    info = DataInfo('x', ['left', 'right'], img_size)
    return ImageDataset(images[:20], same), ImageDataset(images[20:], same), info""":
                "unequal shares"},
    },
    "data/shards": {
        1: {"answer = 100_003": "without headers and padding", "answer = 101_027": "no multiple of 512",
            "answer = 101_376": "the label is a file too", "answer = 102_400": "not what Python writes"},
        2: {"answer = 0, 0": "stops after 16", "answer = 5, 0": "needs 16"},
        3: {"def by_shard(shard, rng): return rng.permutation(len(shard))": "not 3",
            "def by_shard(shard, rng): return np.arange(len(shard))": "the shards always come in one order",
            """
def by_shard(shard, rng):
    return np.concatenate([np.flatnonzero(shard == s) for s in rng.permutation(4)])""":
                "the images of a shard always come in one order",
            "def by_shard(shard, rng): return np.flatnonzero(shard == 0)": "not every image"},
    },
    "data/loaders": {
        1: {"answer = 13470": "the last batch", "answer = 42 * 32": "one epoch", "answer = 10 * 43 * 32": "43 batches"},
        2: {"answer = 10 * 42 * 32": "every picture comes again", "answer = 1347": "the last batch, which is not full",
            "answer = 42": "it is not 42"},
        3: {"""
class Balanced(Sampler):
    def __init__(self, labels, seed=0): self.labels, self.seed, self.epoch = np.array(labels), seed, 0
    def set_epoch(self, epoch): self.epoch = epoch
    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.labels))
        return ((self.epoch, int(i)) for i in order)""": "not four of each",
            """
class Balanced(Sampler):
    def __init__(self, labels, seed=0): self.labels, self.seed, self.epoch = np.array(labels), seed, 0
    def set_epoch(self, epoch): self.epoch = epoch
    def __iter__(self):
        n = np.bincount(self.labels).min()
        return ((self.epoch, int(i)) for c in np.unique(self.labels) for i in np.flatnonzero(self.labels == c)[:n])""":
                "chosen anew",
            """
class Balanced(Sampler):
    def __init__(self, labels, seed=0): self.labels, self.seed, self.epoch = np.array(labels), seed, 0
    def set_epoch(self, epoch): self.epoch = epoch
    def __iter__(self):
        rng, n = np.random.default_rng((self.seed, self.epoch)), np.bincount(self.labels).min()
        return ((self.epoch, int(i)) for c in np.unique(self.labels)
                for i in rng.choice(np.flatnonzero(self.labels == c), n))""": "twice in an epoch"},
    },
    "training/processes": {
        1: {"answer = (1024, 1251)": "all their micro-batches count", "answer = (4096, 313)": "only whole steps",
            "answer = (4096, 1251)": "images"},
        2: {"def exact_mean(sums, counts): return sum(s / n for s, n in zip(sums, counts)) / len(sums)":
                "the mean of the means",
            "def exact_mean(sums, counts): return sum(sums) / len(sums)": "not 3.5"},
        3: {"""
def ring(values):
    sums = list(values)
    rounds = [list(sums)]
    for _ in range(len(values) - 1):
        sums = [s + g for s, g in zip(sums, sums[-1:] + sums[:-1])]
        rounds.append(sums)
    return rounds""": "does each pass on what it was given",
            """
def ring(values):
    sums, given = list(values), list(values)
    rounds = [list(sums)]
    for _ in range(len(values) - 1):
        given = given[1:] + given[:1]
        sums = [s + g for s, g in zip(sums, given)]
        rounds.append(sums)
    return rounds""": "process 1 should have added"},
    },
    "core/cli": {
        1: {"answer = 1": "was the command understood", "answer = 0": "was the command understood"},
        2: {"answer = '-inf'": "takes -inf", "answer = '1e999'": "takes 1e999"},
        3: {"def power_of_two(text): return int(text)": "0 gives 0",
            """
def power_of_two(text):
    if int(text) & (int(text) - 1): raise argparse.ArgumentTypeError(f'{text} is none.')
    return int(text)""": "0 gives 0",
            """
def power_of_two(text):
    if int(text) not in (1, 2, 64): raise argparse.ArgumentTypeError('It is none.')
    return int(text)""": "does not name it"},
    },
    "training/evaluate": {
        1: {"answer = 1000": "too few", "answer = 10_000": "more than it takes"},
        2: {"def from_batches(accuracies, sizes): return sum(accuracies) / len(accuracies)": "not 0.5",
            "def from_batches(accuracies, sizes): return sum(a * n for a, n in zip(accuracies, sizes)) / (sizes[0] * "
            "len(sizes))": "are 3 of 4"},
        3: {"def balanced(said): return sum(row['top1'] for row in by_class(said, range(10))) / 10":
                "not between 0 and 1",
            "def balanced(said): return (said['guess'] == said['label']).double().mean()": "the mean of the ten is"},
    },
    "commands/validate": {
        1: {"answer = 452": "not the same number", "answer = 448": "fewer than there are",
            "answer = 464": "fewer than 464"},
        2: {"answer = 0": "one begins at", "answer = -1": "not negative"},
        3: {"def measure(model, img_size): return '10 %'": "and no number",
            "def measure(model, img_size): return 99.": "and yours 99"},
    },
    "training/trainer": {
        1: {"answer = 0.1": "with 0.1 it is 0.50", "answer = 0.9": "with 0.9 it is"},
        2: {"def correction(n): return 1 - 0.1**n": "after 1 losses of 1",
            "def correction(n): return 0.1 * n": "after 2 losses of 1"},
        3: {"""
class StopBelow(Callback):
    def __init__(self, low): self.low = low
    def after_update(self, trainer):
        if trainer.rate > self.low: raise TrainingStopped('below')""": "it stopped at a rate of",
            """
class StopBelow(Callback):
    def __init__(self, low): self.low = low
    def after_update(self, trainer): return trainer.rate < self.low""": "it went on to the end"},
    },
    "training/mistakes": {
        1: {"answer = 0": "of 2,000 tosses it is 0.50", "answer = 1": "and yours 1.00"},
        2: {"def at_temperature(p, t): return p / t": "they add up to",
            "def at_temperature(p, t): return (p / t).softmax(-1)": "away"},
        3: {"def error_by_guess(said): return {c: calibration_error(said) for c in range(10)}": "and yours",
            "def error_by_guess(said): return {}": "the keys are the classes"},
    },
    "training/finetune": {
        1: {"answer = 64": "with rank 63 they have as many already", "answer = 24": "they have 6,144 numbers",
            "answer = 47.5": "a rank is a whole number"},
        2: {"""
def factors(change, rank):
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    return U[:, :rank], Vh[:rank]""": "is left, and",
            "def factors(change, rank): return change[:, :rank], torch.eye(rank, 5, dtype=change.dtype)": "is possible",
            """
def factors(change, rank):
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    return U * S, Vh""": "shapes (6, 5) and (5, 5)"},
        3: {"""
def only_vectors(model):
    for p in model.parameters(): p.requires_grad_(p.ndim < 2)
    return model""": "head.fc1.weight should learn",
            """
def only_vectors(model):
    for name, p in model.named_parameters(): p.requires_grad_(p.ndim != 2 or name.startswith('head.'))
    return model""": "conv.weight should be frozen"},
    },
    "training/callbacks": {
        1: {"answer = 3": "had not been without a new best", "answer = 7": "it has long stopped"},
        2: {"def shares(d): return d**2, d, 1": "together they are 1",
            "def shares(d): return 1 - d, d * (1 - d), d**2": "the average of 1, 2 and 5",
            "def shares(d): return 0.49, 0.21, 0.3": "with d = 0.9"},
        3: {"""
class Freeze(Callback):
    def __init__(self, name, until): self.name, self.until = name, until
    def after_backward(self, trainer):
        for name, p in trainer.model.named_parameters():
            if name.startswith(self.name): p.grad = None""": "has not moved",
            """
class Freeze(Callback):
    def __init__(self, name, until): self.name, self.until = name, until
    def before_update(self, trainer):
        for name, p in trainer.model.named_parameters():
            if name.startswith(self.name) and trainer.epoch < self.until: p.grad = None""": "the stem has moved"},
    },
    "training/setup": {
        1: {"answer = 11": "left out", "answer = 42": "updates of 128 images are"},
        2: {"answer = '-b 16', '-b 16'": "both have a batch of 16",
            "answer = '-b 16', '-b 32 --seed 1'": "begin with other weights",
            "answer = '-b 16', '-b 32 --model tiny_caformer'": "two different models"},
        3: {"""
def learned(settings, epochs):
    with machine_as_found():
        run = open_run(settings)
        run.fit()
    return next((row['epoch'] for row in run.log if row['val_top1'] >= 50), None)""": "and you say",
            "def learned(settings, epochs): torch.set_num_threads(torch.get_num_threads() + 1); return 1":
                "the machine should be as it was"},
    },
    "training/settings": {
        1: {"answer = (16, 8e-3)": "8,192 images a step", "answer = (8, 1e-3)": "the rate is not 0.001"},
        2: {"def rate_for(r, k): return r": "2 steps of 0.1",
            "def rate_for(r, k): return r * k**0.5": "2 steps of 0.1"},
        3: {"def commands(): return {name: f'torchrun -m metaformer_edu.train DATA --recipe {name}' for name in "
            "list_recipes('*_train')}": "does not begin with",
            "def commands(): return {name: f'torchrun --nproc-per-node 8 -m metaformer_edu.train DATA --recipe {name} "
            "-b 128' for name in list_recipes()}": "is none of them",
            "def commands(): return {name: f'torchrun --nproc-per-node 8 -m metaformer_edu.train DATA --recipe {name} "
            "-b 128 --grad-accum-steps 1' for name in list_recipes('*_train')}": "its global_batch would be 1024",
            "def commands(): return {name: f'torchrun --nproc-per-node 8 -m metaformer_edu.train DATA --recipee {name} "
            "-b 128' for name in list_recipes('*_train')}": "the command does not take"},
    },
    "training/run_folder": {
        1: {"answer = 8 * 10**6": "2 times four", "answer = 12 * 10**6": "3 times four",
            "answer = 4 * 10**6": "1 times four"},
        2: {"def careless_seed(net, optimizer, first, last): return train(net, optimizer, first, last)":
                "the second half agrees",
            """
def careless_seed(net, optimizer, first, last):
    losses = []
    for step in range(first, last):
        torch.seed()
        loss = F.mse_loss(net(x), y)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(loss.item())
    return losses""": "the first half must agree"},
        3: {"def best_interval(write, between): return (write * between)**0.5": "longer than your 120 s",
            "def best_interval(write, between): return between / 2": "shorter than your 3600 s"},
    },
    "commands/train": {
        1: {"answer = (7, (3 / 7, 4 / 7))": "its length is not 7", "answer = (5, (1, 1))": "has the length 1.41",
            "answer = (5, (0, 1))": "point where (3, 4) does"},
        2: {"answer = ''": "batch", "answer = '-b 16 --lr 1e-3'": "lr 0.002 → 0.001",
            "answer = '--batch 16'": "what it says stands above"},
        3: {"answer = 'shapes-same --model tiny_caformer --recovery-interval 20'": "no moving average",
            "answer = '--model tiny_caformer --model-ema --recovery-interval 20'": "the data is digits",
            "answer = 'shapes-same --model-ema --recovery-interval 20'": "the model is tiny_convformer",
            "answer = 'shapes-same --model tiny_caformer --model-ema --recover 20'": "what it says stands above"},
    },
    "interpret/cam": {
        1: {"stage = 1": "at stage 1 of the CAFormer", "stage = 3": "at stage 3 of the CAFormer"},
        2: {"plus_k, times_ten = True, False": "times 10: the map drawn with it is the same",
            "plus_k, times_ten = False, True": "+ k: the map"},
        3: {"""
class Mine(gc.GradCAM):
    def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False):
        return np.zeros(grads.shape[:1] + grads.shape[2:], np.float32)""": "zero everywhere",
            """
class Mine(gc.GradCAM):
    def get_cam_image(self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False):
        return np.linalg.norm(grads, axis=-1)""": "it must be (2, 3, 4)"},
    },
    "interpret/contact_sheet": {
        1: {"number_there = 6": "on its side", "number_there = 1": "still stands on its head",
            "number_there = 2": "mirrored"},
        2: {"factor = 256": "255 would become 65280", "factor = 65535 / 256": "255 would become"},
        3: {"def only_evidence(shown): return shown.pictures * shown.maps[..., None]": "it is not black",
            "def only_evidence(shown): return shown.pictures * (shown.maps < 0.5)[..., None]": "it is not black",
            "def only_evidence(shown): return torch.zeros_like(shown.pictures)": "the picture has changed",
            "def only_evidence(shown): return shown.pictures[shown.maps >= 0.5]": "the pictures have the shape"},
    },
    "commands/explain": {
        1: {"answer = 100 / 24": "a part of a sheet", "answer = 4": "not 4"},
        2: {"answer = ['a.jpg', 'b.jpg', 'c.jpg']": "as it would be alone",
            "answer = ['cat.jpg', 'cat.png']": "these are 2 files"},
        3: {"def best_class(line): return line.split(': ')[1].split(' ')[0], 0.61": "'tabby cat'",
            "def best_class(line): return line.split(': ')[-1].split(', ')[0].rpartition(' ')[0], 61.": "not 61"},
    },
    "models/check_mixer": {
        1: {"axis = 1": "along axis 1 it passes all three", "axis = 3": "along axis 3 it passes",
            "axis = 4": "are 0 to 3"},
        2: {"fraction = 1 / 3": "0.333 is not it", "fraction = 1": "takes something away"},
        3: {"""
class Mended(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer('table', torch.linspace(0.5, 1.5, dim))
    def forward(self, x):
        row = x.mean((0, 2), keepdim=True).expand_as(x)
        return self.table * row / (row.norm(dim=-1, keepdim=True) + 1e-6)""": "in a batch than alone",
            """
class Mended(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer('table', torch.linspace(0.5, 1.5, dim))
    def forward(self, x):
        row = x.mean(2, keepdim=True).expand_as(x)
        return self.table * row / (row.square().sum(-1, keepdim=True).sqrt() + 1e-6)""": "NaN or infinite",
            """
class Mended(nn.Module):
    def __init__(self, dim): super().__init__()
    def forward(self, x): return x""": "something else than Torn"},
    },
    "interpret/snapshots": {
        1: {"answer = 8 * 16 * 16": "that is the maps alone", "answer = 8 * (4 * 5 + 16 * 16)": "is not it"},
        2: {"answer = 1 / 255": "none is more than", "answer = 0.001": "there is a value that is"},
        3: {"def first_right(shots): return [1, 1, None]": "was right, wrong and right",
            """
def first_right(shots):
    right = shots.probabilities.argmax(-1) == shots.labels
    return [next((e for e, r in zip(shots.epochs, picture) if r), None) for picture in right.T]""":
                "was right, wrong and right",
            "def first_right(shots): return [5, 1, 1]": "so it is None"},
    },
    "interpret/faithfulness": {
        1: {"best = min((1, 2, 3, 4), key=lambda s: pointing(maps_of(models['convformer'], 'gradcam', s), "
            "masks).mean())": "of the others hit more",
            "best = sorted((1, 2, 3, 4), key=lambda s: pointing(maps_of(models['convformer'], 'gradcam', s), "
            "masks).mean())[1]": "of the others hit more"},
        2: {"inside = 12 / 64": "768.0", "inside = 12": "at most 1"},
        3: {"def near(masks, pixels): return nn.functional.max_pool2d(masks[:, None].float(), 2 * pixels + 1, 1, "
            "pixels)": "True and False, please",
            "def near(masks, pixels): return nn.functional.max_pool2d(masks[:, None].float(), pixels + 1, 1, pixels // "
            "2)[:, 0].bool()": "some of them are missing",
            "def near(masks, pixels): return nn.functional.max_pool2d(masks[:, None].float(), 4 * pixels + 1, 1, 2 * "
            "pixels)[:, 0].bool()": "it became 81"},
    },
    "interpret/influence": {
        1: {"answer_1 = 1 / 9": "takes the token itself away", "answer_1 = 1 / 25 - 1": "in the middle of the grid"},
        2: {"def chained(first, second, x): return closed_form(first, x) @ closed_form(second, x)":
                "in the other order",
            "def chained(first, second, x): return closed_form(first, x) + closed_form(second, x)":
                "not what the Jacobian says"},
        3: {"""
def left_windows(mixer, x):
    h, w = x.shape[1:3]
    windows = torch.zeros(h, w, 9)
    windows[..., 3] = 1
    return windows.view(h * w, 9)""": "the first column has no left neighbour",
            """
def left_windows(mixer, x):
    h, w = x.shape[1:3]
    windows = torch.zeros(h, w, 9)
    windows[:, 1:, 5] = 1
    return windows.view(h * w, 9)""": "the token on their left",
            "def left_windows(mixer, x): return influence(mixer, x)": "it must have the shape (16, 9)"},
    },
    "interpret/receptive_field": {
        1: {"answer = 7": "somebody is not heard", "answer = 17": "15 is enough already", "answer = 8": "even window"},
        2: {"def counted_side(stage): return 7 + 8 * (stage - 1)": "at the end of stage 3 it is 31 pixels",
            "def counted_side(stage): return 7 * stage": "at the end of stage 2 it is 15 pixels"},
        3: {"""
class Dilated(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
    def forward(self, x): return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)""": "49 tokens, not nine",
            """
class Dilated(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
    def forward(self, x): return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)""":
                "3 tokens to a side, not seven",
            """
class Dilated(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=3, dilation=3)
    def forward(self, x): return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)""": "nine weights of its own"},
    },
    "interpret/swap": {
        1: {"stages = {1, 4}": "stage 2 can be replaced, too", "stages = {1, 2, 3}": "stage 3 changes the answers",
            "stages = {1}": "stage 2 can be"},
        2: {"def shuffle(x, order): return x": "another order",
            "def shuffle(x, order): return x.flatten(1, 2)[:, order.argsort()].view(x.shape)": "another order",
            "def shuffle(x, order): return x.flatten(1, 2)[:, order]": "came out"},
        3: {"def swap_block(model, stage, block, mixer): return swap_mixer(model, stage, mixer)":
                "this is the whole stage",
            "def swap_block(model, stage, block, mixer): return copy.deepcopy(model)": "nothing was swapped",
            """
def swap_block(model, stage, block, mixer):
    model.stages[stage - 1][block - 1] = swap_mixer(model, stage, mixer).stages[stage - 1][block - 1]
    return model""": "the model itself has changed"},
    },
    "speed/roofline": {
        1: {"answer_1 = 2 * 512 * 2048 / (4 * (512 + 2048))": "the weights must move, too",
            "answer_1 = 33.1": "two FLOPs", "answer_1 = 265": "four bytes",
            "answer_1 = 100": "million bytes"},
        2: {"def in_the_limit(C, size): return 8 * C / 5": "yours",
            "def in_the_limit(C, size): return 8 * C / (4 * size)": "and yours 32.0"},
        3: {"def star_in_pieces(x, s, b, out): out.copy_(torch.clamp_min(x, 0).mul_(s).add_(b))": "is not StarReLU",
            "def star_in_pieces(x, s, b, out): out.copy_(x.clamp_min_(0).pow_(2).mul_(s).add_(b))":
                "x itself has changed"},
    },
    "speed/folding": {
        1: {"n = 12": "it is right for", "n = 22": "21 is enough already"},
        2: {"def centre(weight): return weight - weight.mean(0)": "yours gives something",
            "def centre(weight): return weight - weight.mean()": "yours gives something",
            "def centre(weight): return weight * 0": "the rest has changed"},
        3: {"""
def identity_half(x, weight, eps=1e-6):
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    slope = weight * torch.rsqrt(variance + eps)
    return torch.addcmul(-slope * mean, x, 1 + slope)""": "it is not x + n",
            """
def identity_half(x, weight, eps=1e-6):
    variance, mean = torch.var_mean(x, dim=(1, 2, 3), correction=0, keepdim=True)
    slope = weight * torch.rsqrt(variance + eps)
    return torch.addcmul(-slope * mean, x, slope)""": "x is missing",
            """
def identity_half(x, weight, eps=1e-6):
    variance, mean = torch.var_mean(x, dim=(1, 2, 3), keepdim=True)
    slope = weight * torch.rsqrt(variance + eps)
    return torch.addcmul(-slope * mean, x, 1 + slope)""": "it is not x + n"},
    },
    "speed/export": {
        1: {"answer = 'size'": "takes another batch", "answer = 'all'": "'batch', 'size' or 'both'?"},
        2: {"def away(y, truth): return (y - truth).norm() / truth.norm()": "the other way round",
            "def away(y, truth): return (y - truth).norm()": "changes with the unit",
            "def away(y, truth): return (y - truth).norm() / (y.norm() + truth.norm())": "divided otherwise"},
        3: {"def halve(model): return model.half().float()": "it changes the model",
            "def halve(model): return copy.deepcopy(model).half()": "not stored as float32",
            "def halve(model): return copy.deepcopy(model)": "more than 16 bits"},
    },
    "speed/fast": {
        1: {"answer = True": "it says:", "answer = 'no'": "True or False?"},
        2: {"""
def weights(q, k):
    e = torch.exp(q @ k.T)
    return e / e.sum(-1, keepdim=True)""": "exp has overflowed",
            """
def weights(q, k):
    scores = q @ k.T
    e = torch.exp(scores - scores.amax(0))
    return e / e.sum(0)""": "does not sum to 1",
            """
def weights(q, k):
    scores = q @ k.T
    return torch.exp(scores - scores.amax(-1, keepdim=True))""": "does not sum to 1"},
        3: {"def threaded(n): return lambda candidate, example: candidate": "the very candidate",
            "def threaded(n): return lambda candidate, example: replace(candidate)": "it computed with",
            """
class Threaded(nn.Module):
    def __init__(self, net, n):
        super().__init__()
        self.net, self.n = net, n
    def forward(self, x):
        torch.set_num_threads(self.n)
        return self.net(x)
def threaded(n): return lambda candidate, example: replace(candidate, net=Threaded(candidate.net, n), compiled=None)""":
                "it leaves 2 threads"},
    },
    "speed/benchmark": {
        1: {"theirs, ours = [1., 1., 1.], [2., 2., 2.]": "not faster",
            "theirs, ours = [1., 1., 1.], [0.5, 0.5, 0.5]": "in all ours take 1.5",
            "theirs, ours = [1., 1., 1.], [0.5, 9.]": "three rounds"},
        2: {"def kept_by_chain(widths): return 4 * sum(widths)": "[10, 20, 5] keeps 120",
            "def kept_by_chain(widths): return 4 * (sum(widths[:-1]) + sum(widths[1:-1]))": "yours says 200"},
        3: {"def verdict(theirs, ours): return 'ours' if sum(ours) < sum(theirs) else 'theirs'": "'undecided'",
            """
def verdict(theirs, ours):
    middle, low, high = spread(o / t for t, o in zip(theirs, ours))
    if low <= 1 <= high: return 'undecided'
    return 'ours' if middle > 1 else 'theirs'""": "it should be 'ours', and is 'theirs'"},
    },
    "speed/many_gpus": {
        1: {"answer_1 = 128": "are 8,192", "answer_1 = 512": "the share of one of 8 GPUs",
            "answer_1 = 32": "each GPU takes 2 turns"},
        2: {"def root_to_ring(n): return n - 1": "of 3 the one sends 2 gradients",
            "def root_to_ring(n): return n": "of 2 the one sends 1 gradients"},
        3: {"""
def fewest_gpus(work, cluster, hours):
    # as if twice the GPUs took half the time
    n = 8 * cost(work, cluster).hours / hours
    return next((k for k in (8, 16, 32, 64, 128, 256, 512) if k >= n), None)""": "on Ethernet it is None",
            """
def fewest_gpus(work, cluster, hours):
    return min((8, 16, 32, 64, 128, 256, 512), key=lambda n: cost(work, replace(cluster, gpus=n)).hours)""":
                "on the DGX it is 32"},
    },
    "commands/benchmark": {
        1: {"model, contender = 'convformer_s18', 'fast'": "it comes to 78%",
            "model, contender = 'caformer_s18', 'timm compiled float32'": "it comes to",
            "model, contender = 'ConvFormer', 'timm'": "has no"},
        2: {"""
def slow_round(rows, n, times):
    for row in rows: row['seconds'][n] *= times
    return rows""": "make a copy",
            "def slow_round(rows, n, times): return [dict(row, seconds=[s * times for s in row['seconds']]) for row in "
            "rows]": "only that one",
            """
def slow_round(rows, n, times):
    first = [s * times if i == n else s for i, s in enumerate(rows[0]['seconds'])]
    return [dict(rows[0], seconds=first), *rows[1:]]""": "times as long, not 7"},
        3: {"def cores_to_feed(model_row, loader_row): return model_row['images_per_s'] / loader_row['per_core']":
                "not a number of cores",
            "def cores_to_feed(model_row, loader_row): return round(model_row['images_per_s'] / "
            "loader_row['per_core'])": "2 cores of 50"},
    },
    "widgets/base": {
        1: {"answer_1 = [('b', lambda values, facts: values['b'] == -1)]":
                "for s = 1.0 and b = -1.0 it gives 3, and it is ticked",
            "answer_1 = [('always', lambda values, facts: True)]":
                "for s = 0.25 and b = -1.0 it gives 0, and it is not ticked"},
        2: {"def possible(asked, done): return done[-1:] == asked[-1:]": "done [1, 3, 2, 4]: that cannot be",
            "def possible(asked, done): return done == sorted(done) and set(done) <= set(asked)":
                "done [1, 3]: that cannot be",
            "def possible(asked, done): return done[:1] == asked[:1] and done[-1:] == asked[-1:]":
                "done [4]: that can be"},
        3: {"""
def answer_3():
    def same(n):
        fig, ax = new_figure(3, 2)
        ax.plot([0, 1])
        return Shown(fig, 'a line')
    return Explorer(same, dict(n=W.IntSlider(3, min=1, max=9, description='terms')))""": "the picture stayed the same",
            "def answer_3(): return W.IntSlider(3, min=1, max=9)": "not an Explorer"},
    },
    "widgets/activation_explorer": {
        1: {"answer_1 = (1 / moments(gelu)[1], 0)": "then the variance is",
            "answer_1 = (1.701, -0.282)": "the mean is"},
        2: {"answer_2 = 3": "more than 3", "answer_2 = 39.56": "the deviation is not 1"},
        3: {"def tuned(sigma): return 0.8944, -0.4472": "for sigma = 0.5 the variance is 0.06",
            "def tuned(sigma): return 0.8944 / sigma**2, -0.4472 / sigma**2": "for sigma = 0.5 the mean is"},
    },
    "widgets/sources": {
        1: {"answer_1 = [images['china'], images['china']]": "the names are",
            "answer_1 = dict(left=images['china'], right=images['china'])": "left has the size",
            "answer_1 = dict.fromkeys(('left', 'right'), images['china'].crop((0, 0, images['china'].width // 2, "
            "images['china'].height)))":
            "they are not the photograph"},
        2: {"answer_2 = 0": "of 30,000 values one is", "answer_2 = 1 / 255": "that is never reached"},
        3: {"def surest(model, images): return next(iter(images))": "gives",
            "def surest(model, images): return 0": "not the name of an image"},
    },
    "widgets/model_explorer": {
        1: {"answer_1 = 9": "it sees the rows from 2 to 223", "answer_1 = 11": "10 are enough",
            "answer_1 = 9.04": "a whole number"},
        2: {"def attention_macs(n, C): return 4 * n**2 * C**2 + n**4 * C": "for 7×7",
            "def attention_macs(n, C): return 4 * n**2 * C**2 + 2 * n**2 * C": "for 7×7"},
        3: {"def wide_windows(conv, n): return [(conv.kernel_size[0], conv.stride[0], conv.padding[0], n)]":
                "a kernel of 3 with dilation 2",
            "def wide_windows(conv, n): return [(conv.kernel_size[0] * conv.dilation[0], conv.stride[0], "
            "conv.padding[0], n)]": "a kernel of 3 with dilation 2"},
    },
    "widgets/mixing_explorer": {
        1: {"answer_1 = 64 - how_many(several[3, 1].panels[4])": "so many hear themselves",
            "answer_1 = 64": "fewer than 64"},
        2: {"def heard(row_of, grid, token): return row_of(token)": "whom it hears",
            "def heard(row_of, grid, token): return np.array([[row_of((i, j))[token] for j in range(grid[1])] for i in "
            "range(grid[0])]).T": "the grid is 3×5"},
        3: {"def with_mine(): return explore_mixing(swap_mixer(create_model('tiny_identityformer', img_size=128), 3, "
            "Pooling))": "5 panels",
            """
class Mine(nn.Module):
    def __init__(self, dim): super().__init__()
    def forward(self, x): return x.roll(1, 2)
def with_mine(): return explore_mixing(swap_mixer(create_model('tiny_identityformer', img_size=128), 2, Mine))""":
                "5 panels in stage 3"},
    },
    "widgets/cam_explorer": {
        1: {"answer_1 = 4 * (96**2 * 64 + 48**2 * 128 + 24**2 * 320 + 12**2 * 512) / 2**20": "that is one image",
            "answer_1 = 8 * 4 * (56**2 * 64 + 28**2 * 128 + 14**2 * 320 + 7**2 * 512) / 2**20": "at 224 px",
            "answer_1 = 8 * 4 * 384**2 * 3 / 2**20": "numbers of 4 bytes"},
        2: {"answer_2 = ['gradcam']": "the maps of gradcam differ", "answer_2 = []": "1 missing",
            "answer_2 = ['random']": "random is none of"},
        3: {"def answer_3(cache, image, n): return cache.model(to_batch(image, "
            "cache.model))[0].topk(n).indices.tolist()": "the model ran 2 times",
            "def answer_3(cache, image, n): return cache.explain(image).logits[0].topk(n).values.tolist()":
                "and should be",
            "def answer_3(cache, image, n): return [int(cache.explain(image).logits[0].argmax())]": "gives 1 and 1"},
    },
    "widgets/training_explorer": {
        1: {"answer_1 = 7": "after epoch 7 it is 86.2 %", "answer_1 = 9": "not for the first time",
            "answer_1 = 0": "the epochs are 1 to 12"},
        2: {"answer_2 = 100": "less than 100", "answer_2 = 0.68": "in percent"},
        3: {"def answer_3(shots): return (shots.probabilities.argmax(-1)[1:] == "
            "shots.probabilities.argmax(-1)[:-1]).sum(1).tolist()": "at step 1",
            "def answer_3(shots): return (shots.probabilities.argmax(-1) != "
            "shots.probabilities.argmax(-1)[0]).sum(1).tolist()": "yours are 20"},
    },
    "widgets/page": {
        1: {"answer_1 = [example_runs()['convformer'], example_runs()['caformer']]": "a list gives each model",
            "answer_1 = dict(attention=example_runs()['caformer'])": "the names on the page are",
            "answer_1 = dict(convolutions=example_runs()['caformer'], attention=example_runs()['convformer'])":
            "in stage 3 they mix"},
        2: {"answer_2 = 2**-12": "one of 200,000 weights changes", "answer_2 = 2**-10": "that is never reached"},
        3: {"def unpack(text): return zlib.decompress(base64.b85decode(text.replace('/', '<')))": "come back changed",
            """
def unpack(text):
    planes = zlib.decompress(base64.b85decode(text.replace('/', '<')))
    half = len(planes) // 2
    return b''.join(bytes(pair) for pair in zip(planes[:half], planes[half:]))""": "bytes come back as"},
    },
    "commands/explore": {
        1: {"answer_1 = {**SECTIONS, 'activation': SECTIONS['activation']}": "it begins with model",
            "answer_1 = {'activation': SECTIONS['activation']}": "not the same sections",
            "answer_1 = dict(sorted(SECTIONS.items()))": "the others are not in their order"},
        2: {"answer_2 = 54": "these are seconds", "answer_2 = 4": "more than 10 to the power of 4",
            "answer_2 = 58": "less than"},
        3: {"def answer_3(models): return W.VBox([explore_cam(model) for model in models.values()])": "no heading says",
            "def answer_3(models): return W.VBox([W.HTML(f'<h2>{name}</h2>') for name in models])": "0 explorers",
            "def answer_3(models): return [explore_cam(model) for model in models.values()]": "not a VBox"},
    },
    "experiments/compare": {
        1: {"answer = 4": "can only reach 0.029", "answer = 6": "fewer would do"},
        2: {"answer = (0.9 * 0.1 / 500)**0.5": "another number", "answer = 100 * 0.9 * 0.1 / 500": "another number"},
        3: {"def paired(a, b): return permutation_test(a, b)": "of 8 ways to swap",
            """
def paired(a, b):
    differences = [x - y for x, y in zip(a, b)]
    ways = [sum(s * d for s, d in zip(signs, differences)) for signs in itertools.product([1, -1], repeat=len(a))]
    return sum(way >= sum(differences) - 1e-9 for way in ways) / len(ways)""": "of 8 ways to swap"},
    },
    "experiments/arms": {
        1: {"answer = len(EXPERIMENTS['mixers'].arms) * EXPERIMENTS['mixers'].budget.pictures": "one run of each arm",
            "answer = EXPERIMENTS['mixers'].budget.pictures": "not "},
        2: {"answer = (0.8944, 0.4472)": "up to 0.89 apart", "answer = (1, 0)": "apart"},
        3: {"def window_arms(): return [Arm('shape', k, dict(token_mixers=partial(SepConv, kernel_size=k))) for k in "
            "(3, 5, 7, 9)]": "the names are [3, 5, 7, 9]",
            "def window_arms(): return [Arm('shape', str(k), dict(token_mixers=SepConv)) for k in (3, 5, 7, 9)]":
                "the windows are [7, 7, 7, 7]"},
    },
    "commands/experiment": {
        1: {"answer = 10": "one run of each arm", "answer = 50": "not 50"},
        2: {"answer = 18": "not 18", "answer = -2": "fewer than none"},
        3: {"def lines(name, seeds): return [f'metaformer-experiment {name} --seeds {seeds}']": "three lines, not 1",
            "def lines(name, seeds): return [f'metaformer-experiment {name} --seeds {n} --output {name}.csv' for n in "
            "(1, 2, 3)]": "the files are"},
    },
    "tutorials/five_minutes": {
        1: {"mine = create_model('tiny_convformer', token_mixers='Attention')":
                "its stages mix with Attention, Attention",
            "mine = create_model('tiny_convformer', token_mixers=('Attention', 'Attention', 'SepConv', 'SepConv'))":
                "its stages mix with Attention"},
        2: {"def stem_macs(side, channels): return side**2 * channels * 7 * 7": "it is ",
            "def stem_macs(side, channels): return (4 * side)**2 * channels * 7 * 7 * 3": "it is "},
        3: {"def hardest(said): return int(said['label'][said['guess'] != said['label']].min())": "it is 1",
            "def hardest(said): return said['label'].bincount().argmin().item()": "it is 1"},
    },
    "tutorials/your_own_mixer": {
        1: {"""
class RowMixer(GatedCross):
    def forward(self, x): return self.proj(self.gate(x).sigmoid() * self.value(x).mean(1, keepdim=True))""":
                "does not hear its whole row",
            "class RowMixer(GatedCross): pass": "hears more than the four"},
        2: {"def heard(h, w, mixers): return h + w if mixers == 1 else h * w": "it is 6 and not 7",
            "def heard(h, w, mixers): return h + w - 1": "it is 12 and not 6"},
        3: {"""
class MyMixer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)
    def forward(self, x): return self.proj(x)""": "no token hears another",
            """
class MyMixer(nn.Module):
    def __init__(self, dim): super().__init__()
    def forward(self, x): return x.mean((1, 2))""": "come back as (3, 32)"},
    },
    "tutorials/your_own_photos": {
        1: {"answer = 90": "what was measured", "answer = 85": "the interval begins at"},
        2: {"answer_2 = 7": "there are 12", "answer_2 = 21": "there are 12"},
        3: {"def split_by_day(files, days): return files[::2], files[1::2]": "held out must be",
            "def split_by_day(files, days): return files, [f for f in files if f.split('_')[1] in days]":
                "all the others are for training"},
    },
    "tutorials/imagenet_for_real": {
        1: {"answer = '-b 192'": "192 images at once do not fit", "answer = '-b 48'": "an update sees 48 images"},
        2: {"""
def leaky(box, n, m, dice, size=72):
    square = lambda: tuple(int(dice.integers(box[i], box[i + 2] - size + 1)) for i in (0, 1))
    learned = {square() for _ in range(n)}
    return sum(square() in learned for _ in range(m)) / m""": "in a large box",
            """
def leaky(box, n, m, dice, size=72):
    def square():
        x, y = (int(dice.integers(box[i], box[i + 2] - size + 1)) for i in (0, 1))
        return x, y, x + size, y + size
    learned = [square() for _ in range(n)]
    return sum(all(apart(square(), s) for s in learned) for _ in range(m)) / m""": "there is only one square"},
        3: {"""
def add_sky(root):
    frames = (330, 0, 480, 90), (400, 0, 640, 90)
    for part, box, n in zip(('train', 'val'), frames, (40, 20)): fill(f'{root}/{part}/sky', 'china', box, n)
    return frames""": "two frames share a pixel",
            """
def add_sky(root):
    frames = (0, 0, 320, 90), (490, 0, 640, 90)
    for part, box, n in zip(('train', 'val'), frames, (40, 20)): fill(f'{root}/{part}/sky', 'china', box, n)
    return frames""": "more than sky"},
    },
}
