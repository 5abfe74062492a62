//! Byte-pair encoding of one word: the merge of lowest rank first, the leftmost of equals, as the
//! `tokenizers` crate does it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::table::{NONE, Pairs, Table};

/// Words of more symbols are merged with a heap.
const SHORT: usize = 48;

/// A BPE model.
#[derive(Debug)]
pub(crate) struct Bpe {
    /// Tokens as the bytes of text they stand for (`byte_level`), else as they are spelled.
    pub tokens: Table,
    pub pairs: Pairs,
    /// A symbol is a byte, else a character.
    pub byte_level: bool,
    /// Ids of the bytes as symbols (`byte_level`), else of the characters below 128; [`NONE`] for none.
    pub bytes: [u32; 256],
    /// Ids of tokens like `<0xE2>`, where unknown characters become these; [`NONE`] for none.
    pub fallback: Option<Box<[u32; 256]>>,
    /// The id of `▁`, which most words begin with.
    pub mark: Option<u32>,
    pub unknown: Option<u32>,
    /// Unknown characters side by side are one.
    pub fuse_unknown: bool,
    /// A word that is a token is that token.
    pub whole_words: bool,
}

/// A symbol and the bytes of the spelling that it stands for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Symbol {
    pub id: u32,
    pub length: u32,
}

/// Buffers that a thread keeps between words.
#[derive(Debug, Default)]
pub(crate) struct Work {
    symbols: Vec<Symbol>,
    links: Vec<Link>,
    heap: BinaryHeap<Reverse<u64>>,
}

#[derive(Debug, Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
    /// Of the pair with the next symbol.
    rank: u32,
}

impl Bpe {
    /// Append the ids of a word.
    pub fn encode(&self, word: &[u8], work: &mut Work, ids: &mut Vec<u32>) {
        if self.whole_words
            && let Some(id) = self.tokens.get(word)
        {
            ids.push(id);
            return;
        }
        if self.byte_level && word.len() <= SHORT {
            let mut symbols = [0; SHORT];
            let mut known = true;
            for (symbol, &byte) in symbols.iter_mut().zip(word) {
                *symbol = self.bytes[byte as usize];
                known &= *symbol != NONE;
            }
            if known {
                let mut ranks = [NONE; SHORT];
                for (rank, two) in ranks.iter_mut().zip(word.windows(2)) {
                    *rank = self.pairs.first(two[0], two[1]);
                }
                let count = self.merge_short(&mut symbols, &mut ranks, word.len());
                ids.extend_from_slice(&symbols[..count]);
                return;
            }
        }
        self.symbols(word, &|_| false, &mut work.symbols);
        let count = work.symbols.len();
        if count <= SHORT {
            let mut symbols = [0; SHORT];
            for (id, symbol) in symbols.iter_mut().zip(&work.symbols) {
                *id = symbol.id;
            }
            let mut ranks = [NONE; SHORT];
            for at in 1..count {
                ranks[at - 1] = self.pairs.rank(symbols[at - 1], symbols[at]);
            }
            let count = self.merge_short(&mut symbols, &mut ranks, count);
            ids.extend_from_slice(&symbols[..count]);
            return;
        }
        self.merge_long(work, &|_| false);
        ids.extend(work.symbols.iter().map(|symbol| symbol.id));
    }

    /// The symbols of a word, with the bytes each stands for, as the crate counts them.
    pub fn encode_spans<'w>(&self, word: &[u8], work: &'w mut Work) -> &'w [Symbol] {
        let whole = self.whole_words.then(|| self.tokens.get(word)).flatten();
        match whole {
            Some(id) => {
                work.symbols.clear();
                let spelled = |&byte: &u8| super::model::alphabet_char(byte).len_utf8();
                let length = match self.byte_level {
                    true => word.iter().map(spelled).sum(),
                    false => word.len(),
                } as u32;
                work.symbols.push(Symbol { id, length });
            }
            None => {
                self.symbols(word, &|_| false, &mut work.symbols);
                self.merge_long(work, &|_| false);
            }
        }
        &work.symbols
    }

    /// Append the ids of a word, none of which is `banned`.
    pub fn encode_without(
        &self,
        word: &[u8],
        banned: &dyn Fn(u32) -> bool,
        work: &mut Work,
        ids: &mut Vec<u32>,
    ) {
        self.symbols(word, banned, &mut work.symbols);
        self.merge_long(work, banned);
        ids.extend(work.symbols.iter().map(|symbol| symbol.id));
    }

    /// A word's first symbols. The crate's order is kept: bytes of a character overtake unknown ones
    /// before it that are not written yet.
    fn symbols(&self, word: &[u8], banned: &dyn Fn(u32) -> bool, symbols: &mut Vec<Symbol>) {
        symbols.clear();
        let mut unknown: Option<Symbol> = None;
        let mut at = 0;
        while let Some(&byte) = word.get(at) {
            let width = match self.byte_level {
                true => 1,
                false => super::words::width(byte).min(word.len() - at),
            };
            let symbol = &word[at..at + width];
            let length = match self.byte_level {
                true => super::model::alphabet_char(byte).len_utf8() as u32,
                false => width as u32,
            };
            at += width;
            // A byte has no other way to be said.
            let allowed = |id: &u32| self.byte_level || !banned(*id);
            if let Some(id) = self.symbol(symbol).filter(allowed) {
                symbols.extend(unknown.take());
                symbols.push(Symbol { id, length });
                continue;
            }
            if let Some(fallback) = &self.fallback
                && symbol.iter().all(|&byte| fallback[byte as usize] != NONE)
            {
                let bytes = symbol.iter().map(|&byte| fallback[byte as usize]);
                symbols.extend(bytes.map(|id| Symbol { id, length: 1 }));
                continue;
            }
            let Some(id) = self.unknown else { continue };
            unknown = match unknown {
                Some(before) if self.fuse_unknown => Some(Symbol {
                    id,
                    length: before.length + length,
                }),
                before => {
                    symbols.extend(before);
                    Some(Symbol { id, length })
                }
            };
        }
        symbols.extend(unknown);
    }

    #[inline]
    fn symbol(&self, symbol: &[u8]) -> Option<u32> {
        match symbol {
            [byte] => Some(self.bytes[*byte as usize]).filter(|&id| id != NONE),
            [0xe2, 0x96, 0x81] => self.mark,
            symbol => self.tokens.get(symbol),
        }
    }

    /// Merge the first `count` symbols in place, whose pairs have these ranks; returns how many are left.
    #[inline]
    fn merge_short(
        &self,
        symbols: &mut [u32; SHORT],
        ranks: &mut [u32; SHORT],
        mut count: usize,
    ) -> usize {
        while count > 1 {
            let (mut at, mut lowest) = (0, NONE);
            for (i, &rank) in ranks[..count - 1].iter().enumerate() {
                if rank < lowest {
                    (at, lowest) = (i, rank);
                }
            }
            if lowest == NONE {
                break;
            }
            symbols[at] = self.pairs.merged(lowest);
            symbols.copy_within(at + 2..count, at + 1);
            ranks.copy_within(at + 1..count, at);
            count -= 1;
            if at > 0 {
                ranks[at - 1] = self.pairs.rank(symbols[at - 1], symbols[at]);
            }
            ranks[at] = match at + 1 < count {
                true => self.pairs.rank(symbols[at], symbols[at + 1]),
                false => NONE,
            };
        }
        count
    }

    /// Merge `work.symbols`: time grows with n log n, however the text was chosen.
    fn merge_long(&self, work: &mut Work, banned: &dyn Fn(u32) -> bool) {
        const END: u32 = u32::MAX;
        let Work {
            symbols,
            links,
            heap,
        } = work;
        let rank_of = |left: u32, right: u32| match self.pairs.rank(left, right) {
            NONE => NONE,
            rank if banned(self.pairs.merged(rank)) => NONE,
            rank => rank,
        };
        let count = symbols.len() as u32;
        links.clear();
        heap.clear();
        for at in 0..count {
            let next = if at + 1 < count { at + 1 } else { END };
            let rank = match next {
                END => NONE,
                next => rank_of(symbols[at as usize].id, symbols[next as usize].id),
            };
            if rank != NONE {
                heap.push(Reverse(u64::from(rank) << 32 | u64::from(at)));
            }
            let previous = at.checked_sub(1).unwrap_or(END);
            links.push(Link {
                previous,
                next,
                rank,
            });
        }
        while let Some(Reverse(entry)) = heap.pop() {
            let (rank, at) = ((entry >> 32) as u32, entry as u32 as usize);
            // Merged into its left neighbour, or of another pair by now.
            if symbols[at].length == 0 || links[at].rank != rank {
                continue;
            }
            let right = links[at].next as usize;
            symbols[at].id = self.pairs.merged(rank);
            symbols[at].length += symbols[right].length;
            symbols[right].length = 0;
            let next = links[right].next;
            links[at].next = next;
            let mut renew = |left: u32, right: u32| {
                let rank = rank_of(symbols[left as usize].id, symbols[right as usize].id);
                links[left as usize].rank = rank;
                if rank != NONE {
                    heap.push(Reverse(u64::from(rank) << 32 | u64::from(left)));
                }
            };
            match next {
                END => links[at].rank = NONE,
                next => {
                    renew(at as u32, next);
                    links[next as usize].previous = at as u32;
                }
            }
            let previous = links[at].previous;
            if previous != END {
                let rank = rank_of(symbols[previous as usize].id, symbols[at].id);
                links[previous as usize].rank = rank;
                if rank != NONE {
                    heap.push(Reverse(u64::from(rank) << 32 | u64::from(previous)));
                }
            }
        }
        symbols.retain(|symbol| symbol.length != 0);
    }
}
