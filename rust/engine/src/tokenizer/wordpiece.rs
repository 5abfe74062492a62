//! WordPiece and whole words: the longest token first, as the `tokenizers` crate does it.

use super::table::Table;

/// A WordPiece model; without a prefix, one of whole words.
#[derive(Debug)]
pub(crate) struct WordPiece {
    pub tokens: Table,
    pub unknown: u32,
    /// What tokens within a word begin with; `None`: a word is one token.
    pub prefix: Option<String>,
    /// Words of more characters are unknown.
    pub longest: usize,
}

impl WordPiece {
    /// Call `add` with each id of a word and its bytes of it.
    pub fn encode(
        &self,
        word: &[u8],
        buffer: &mut Vec<u8>,
        mut add: impl FnMut(u32, (usize, usize)),
    ) {
        let whole = (0, word.len());
        let Some(prefix) = &self.prefix else {
            add(self.tokens.get(word).unwrap_or(self.unknown), whole);
            return;
        };
        let begins = |at: usize| word.get(at).is_none_or(|byte| byte & 0xc0 != 0x80);
        if word.len() > self.longest
            && (0..word.len()).filter(|&at| begins(at)).count() > self.longest
        {
            return add(self.unknown, whole);
        }
        let mut found = Vec::new();
        let mut start = 0;
        while start < word.len() {
            buffer.clear();
            if start > 0 {
                buffer.extend_from_slice(prefix.as_bytes());
            }
            let before = buffer.len();
            buffer.extend_from_slice(&word[start..]);
            let mut length = word.len() - start;
            let id = loop {
                if length == 0 {
                    return add(self.unknown, whole);
                }
                if let Some(id) = self.tokens.get(&buffer[..before + length]) {
                    break id;
                }
                length -= 1;
                while !begins(start + length) {
                    length -= 1;
                }
            };
            found.push((id, (start, start + length)));
            start += length;
        }
        found.into_iter().for_each(|(id, span)| add(id, span));
    }
}
