//! Queries from guests and answers from resolvers, as the relay reads them.
#![no_main]
#![allow(
    dead_code,
    reason = "the parser's file has more than this target calls"
)]

#[path = "."]
mod relay {
    #[path = "../../crates/net/src/relay/message.rs"]
    mod message;

    /// One query and one answer to it.
    pub fn pass(query: &[u8], reply: &[u8], id: [u8; 2]) {
        let Some(read) = message::Query::read(query) else {
            return;
        };
        let sent = read.numbered(id);
        assert_eq!((&sent[..2], &sent[2..]), (&id[..], &query[2..]));
        let failure = read.failure();
        assert!(failure.len() <= query.len() && failure[..2] == query[..2]);
        // Our own refusal answers the query, once it has the number that was sent.
        let mut refusal = failure.clone();
        refusal[..2].copy_from_slice(&id);
        assert_eq!(read.answer(&refusal, id).as_ref(), Some(&failure));
        if let Some(answer) = read.answer(reply, id) {
            assert_eq!((&answer[..2], &answer[2..]), (&query[..2], &reply[2..]));
            assert_eq!(reply[..2], id, "an answer to another query");
        }
    }
}

use libfuzzer_sys::fuzz_target;

// The number a query is sent under, how long it is, the query, and an answer.
fuzz_target!(|data: &[u8]| {
    let [id0, id1, length, rest @ ..] = data else {
        return;
    };
    let id = [*id0, *id1];
    let (query, reply) = rest.split_at(usize::from(*length).min(rest.len()));
    relay::pass(query, reply, id);
    // The likeliest answer to pass: the question itself, marked as an answer.
    let mut echo = query.to_vec();
    if let [id0, id1, flags, ..] = &mut echo[..] {
        [*id0, *id1] = id;
        *flags |= 0x80;
        relay::pass(query, &echo, id);
    }
});
