//! Tokens by their bytes, for those that begin at a place.

pub(super) const ROOT: u32 = 0;
pub(super) const NO_TOKEN: u32 = u32::MAX;

/// Tokens by their bytes. A node's children lie side by side, in order.
#[derive(Debug)]
pub(super) struct Trie {
    /// First child and token of each node; a last one ends the children of the one before it.
    nodes: Vec<(u32, u32)>,
    /// The byte that leads to each node.
    labels: Vec<u8>,
    /// Children of the root.
    roots: Box<[u32; 256]>,
}

impl Trie {
    /// Breadth first over the sorted tokens. `None` for an empty token, and for two that are alike.
    pub fn new(mut sorted: Vec<(&[u8], u32)>) -> Option<Self> {
        sorted.sort_unstable();
        let empty = sorted.first().is_some_and(|(token, _)| token.is_empty());
        if empty || sorted.windows(2).any(|two| two[0].0 == two[1].0) {
            return None;
        }
        let mut trie = Self {
            nodes: vec![(1, NO_TOKEN)],
            labels: vec![0],
            roots: Box::new([0; 256]),
        };
        // Ranges of the sorted tokens that share a node's bytes, in the order of nodes.
        let mut ranges = std::collections::VecDeque::from([(0, sorted.len(), 0usize)]);
        let mut node = 0;
        while let Some((mut from, to, depth)) = ranges.pop_front() {
            trie.nodes[node].0 = trie.nodes.len() as u32;
            if from < to && sorted[from].0.len() == depth {
                trie.nodes[node].1 = sorted[from].1;
                from += 1;
            }
            while from < to {
                let label = sorted[from].0[depth];
                let end = from + sorted[from..to].partition_point(|(t, _)| t[depth] == label);
                if node == 0 {
                    trie.roots[label as usize] = trie.nodes.len() as u32;
                }
                trie.nodes.push((0, NO_TOKEN));
                trie.labels.push(label);
                ranges.push_back((from, end, depth + 1));
                from = end;
            }
            node += 1;
        }
        trie.nodes.push((trie.nodes.len() as u32, NO_TOKEN));
        Some(trie)
    }

    /// The node that a byte leads to.
    #[inline]
    pub fn step(&self, node: u32, byte: u8) -> Option<u32> {
        if node == ROOT {
            return Some(self.roots[byte as usize]).filter(|&child| child != 0);
        }
        let first = self.nodes[node as usize].0 as usize;
        let end = self.nodes[node as usize + 1].0 as usize;
        let labels = self.labels.get(first..end)?;
        let at = match labels.len() {
            0..=8 => labels.iter().position(|&label| label == byte)?,
            _ => labels.binary_search(&byte).ok()?,
        };
        Some((first + at) as u32)
    }

    /// The token that ends at a node, or [`NO_TOKEN`].
    #[inline]
    pub fn token(&self, node: u32) -> u32 {
        self.nodes[node as usize].1
    }
}
