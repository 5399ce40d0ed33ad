//! Reading sets that rules have filled.

use std::io;
use std::time::Duration;

use super::{
    DATA_VALUE, DEL_ELEMENTS, FAMILY_INET, GET_ELEMENTS, LIST_ELEM, NEW_ELEMENTS, nfgenmsg,
};
use crate::netlink::{ROOT_MATCH_DUMP, Request, Socket, attributes};

/// `struct nfgenmsg`.
const NFGENMSG: usize = 4;

/// An element of a set.
#[derive(Debug, Clone)]
pub(crate) struct Element {
    /// The fields, each padded to four bytes.
    pub(crate) key: Vec<u8>,
    /// When it goes if nothing renews it.
    pub(crate) goes_in: Duration,
    /// Packets counted, if the rule counts.
    pub(crate) packets: u64,
}

impl Element {
    /// The field at that place of the key.
    pub(crate) fn field(&self, at: usize) -> [u8; 4] {
        self.key
            .get(at * 4..)
            .and_then(|rest| rest.first_chunk::<4>())
            .copied()
            .unwrap_or_default()
    }
}

/// All elements of a set.
pub(crate) fn elements(socket: &mut Socket, table: &str, set: &str) -> io::Result<Vec<Element>> {
    let request =
        Request::new(GET_ELEMENTS, ROOT_MATCH_DUMP, &nfgenmsg(FAMILY_INET, 0)).attrs(|attrs| {
            attrs.text(1, table).text(2, set);
        });
    let mut found = Vec::new();
    socket.query(&request, |answer| {
        if answer.kind != NEW_ELEMENTS {
            return;
        }
        for (_, list) in attributes(answer.body, NFGENMSG).filter(|(kind, _)| *kind == 3) {
            found.extend(
                attributes(list, 0)
                    .filter(|(kind, _)| *kind == LIST_ELEM)
                    .filter_map(|(_, element)| read(element)),
            );
        }
    })?;
    Ok(found)
}

fn read(element: &[u8]) -> Option<Element> {
    let mut read = Element {
        key: Vec::new(),
        goes_in: Duration::ZERO,
        packets: 0,
    };
    for (kind, data) in attributes(element, 0) {
        match kind {
            1 => {
                read.key = attributes(data, 0)
                    .find(|(kind, _)| *kind == DATA_VALUE)?
                    .1
                    .to_vec();
            }
            5 => read.goes_in = Duration::from_millis(number(data)),
            // An expression: its name, and its data, which for a counter are bytes and packets.
            7 => {
                read.packets = attributes(data, 0)
                    .find(|(kind, _)| *kind == 2)
                    .and_then(|(_, counter)| attributes(counter, 0).find(|(kind, _)| *kind == 2))
                    .map_or(0, |(_, packets)| number(packets));
            }
            _ => {}
        }
    }
    (!read.key.is_empty()).then_some(read)
}

fn number(data: &[u8]) -> u64 {
    data.first_chunk::<8>()
        .map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// Removes elements of a set, each by itself: one that is gone meanwhile is no failure.
pub(crate) fn remove_elements(
    socket: &mut Socket,
    table: &str,
    set: &str,
    doomed: &[Element],
) -> io::Result<()> {
    for element in doomed {
        let mut batch = super::Batch::new(table);
        batch.push(DEL_ELEMENTS, 0, |attrs| {
            attrs.text(2, set).nest(3, |list| {
                list.nest(LIST_ELEM, |elem| {
                    elem.nest(1, |key| {
                        key.bytes(DATA_VALUE, &element.key);
                    });
                });
            });
        });
        match batch.commit(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
