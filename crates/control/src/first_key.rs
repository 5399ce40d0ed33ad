//! The first API key: made once, and left where the command line finds it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use wrenn_store::{NewKey, Store, Timestamp};
use wrenn_types::{ApiKey, TeamId};

use crate::ControlError;

/// Its file in the data folder.
const FILE: &str = "api-key";

/// Makes the first key if there is none; the file is whole or not there.
pub(crate) async fn ensure(
    store: &Store,
    team: TeamId,
    data_dir: &Path,
) -> Result<Option<ApiKey>, ControlError> {
    if store.count_keys().await? > 0 {
        return Ok(None);
    }
    let key = ApiKey::generate()?;
    // The file first: a key in the database that nobody has would keep this from running again.
    write(data_dir, &key).map_err(|source| ControlError::File {
        what: "writing",
        path: data_dir.join(FILE),
        source,
    })?;
    let new = NewKey {
        team,
        name: "first".to_owned(),
        hash: key.hash(),
        prefix: key.prefix(),
    };
    store.insert_key(new, Timestamp::now()).await?;
    Ok(Some(key))
}

fn write(data_dir: &Path, key: &ApiKey) -> io::Result<()> {
    let temporary = data_dir.join(".api-key.new");
    match std::fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    writeln!(file, "{}", key.reveal())?;
    file.sync_all()?;
    std::fs::rename(&temporary, data_dir.join(FILE))?;
    File::open(data_dir)?.sync_all()
}
