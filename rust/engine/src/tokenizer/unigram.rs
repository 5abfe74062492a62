//! The Unigram model (Kudo 2018): the likeliest split of a text into tokens, in the `tokenizers` crate's
//! order of additions and ties.

use super::table::{NONE, Table};
use super::trie::{NO_TOKEN, ROOT, Trie};

/// What an unknown character costs beyond the worst token.
const UNKNOWN_PENALTY: f64 = 10.0;

/// A Unigram model.
#[derive(Debug)]
pub(crate) struct Unigram {
    pub tokens: Table,
    scores: Vec<f64>,
    unknown: Option<u32>,
    unknown_score: f64,
    fallback: Option<Box<[u32; 256]>>,
    trie: Trie,
}

/// A token of a split: its bytes of the text, and whether it is of unknown characters.
#[derive(Debug, Clone, Copy)]
struct Piece {
    start: usize,
    end: usize,
    id: u32,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    id: u32,
    score: f64,
    /// Where the token that ends here begins; [`NO_TOKEN`] while none does.
    start: u32,
}

/// Buffers that a thread keeps between words.
#[derive(Debug, Default)]
pub(crate) struct Work {
    nodes: Vec<Node>,
    pieces: Vec<Piece>,
}

impl Unigram {
    /// A model of tokens with their scores by id. `None` for what the crate would refuse, or panic at.
    pub fn new(
        tokens: Table,
        scores: Vec<f64>,
        unknown: Option<u32>,
        fallback: Option<Box<[u32; 256]>>,
    ) -> Option<Self> {
        let finite = scores.iter().all(|score| score.is_finite());
        let whole = tokens.len() == scores.len() && tokens.end() == scores.len();
        if !finite || !whole || unknown.is_some_and(|id| id as usize >= scores.len()) {
            return None;
        }
        let least = scores.iter().copied().fold(f64::INFINITY, f64::min);
        let trie = Trie::new(tokens.iter().map(|(id, token)| (token, id)).collect())?;
        Some(Self {
            tokens,
            scores,
            unknown,
            unknown_score: least - UNKNOWN_PENALTY,
            fallback,
            trie,
        })
    }

    /// Append the ids of a text, with `span` told the bytes of each; no `banned` id is used but for unknown
    /// characters. `None` when a character is unknown and there is no unknown token.
    pub fn encode(
        &self,
        text: &[u8],
        banned: &dyn Fn(u32) -> bool,
        work: &mut Work,
        mut add: impl FnMut(u32, (usize, usize)),
    ) -> Option<()> {
        self.split(text, banned, work)?;
        for piece in work.pieces.iter().rev() {
            let bytes = &text[piece.start..piece.end];
            let span = (piece.start, piece.end);
            if Some(piece.id) != self.unknown {
                add(piece.id, span);
                continue;
            }
            match (self.tokens.get(bytes), &self.fallback) {
                (Some(id), _) if !banned(id) => add(id, span),
                (_, Some(fallback)) if bytes.iter().all(|&b| fallback[b as usize] != NONE) => {
                    bytes.iter().for_each(|&b| add(fallback[b as usize], span));
                }
                _ => add(piece.id, span),
            }
        }
        Some(())
    }

    /// Fill `work.pieces`, last first; unknown characters side by side are one piece.
    fn split(&self, bytes: &[u8], banned: &dyn Fn(u32) -> bool, work: &mut Work) -> Option<()> {
        let Work { nodes, pieces } = work;
        nodes.clear();
        let nowhere = Node {
            id: 0,
            score: 0.0,
            start: NO_TOKEN,
        };
        nodes.resize(bytes.len() + 1, nowhere);
        let mut start = 0;
        while start < bytes.len() {
            let here = nodes[start].score;
            let width = super::words::width(bytes[start]);
            let mut single = false;
            let mut offer = |end: usize, id: u32, score: f64| {
                let node = &mut nodes[end];
                if node.start == NO_TOKEN || score > node.score {
                    *node = Node {
                        id,
                        score,
                        start: start as u32,
                    };
                }
            };
            let mut state = ROOT;
            for (end, &byte) in bytes.iter().enumerate().skip(start) {
                let Some(next) = self.trie.step(state, byte) else {
                    break;
                };
                state = next;
                let id = self.trie.token(state);
                if id != NO_TOKEN && !banned(id) {
                    offer(end + 1, id, self.scores[id as usize] + here);
                    single |= end + 1 - start == width;
                }
            }
            if !single {
                offer(start + width, self.unknown?, self.unknown_score + here);
            }
            start += width;
        }
        pieces.clear();
        let mut end = bytes.len();
        while end > 0 {
            let Node { id, start, .. } = nodes[end];
            let start = start as usize;
            match pieces.last_mut() {
                Some(last) if Some(id) == self.unknown && last.id == id => last.start = start,
                _ => pieces.push(Piece { start, end, id }),
            }
            end = start;
        }
        Some(())
    }
}
