//! A clone that was saved, and the ways it comes back.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use wrenn_vmm::{
    Delta, Firmware, LoadSpec, Machine, PageBuffer, PageRange, QemuVmm, RunState, Vmm, VmmError,
    state_file,
};

use crate::common::{Template, qcow2};

/// A saved clone, held in memory.
pub struct Saved {
    pub state: Vec<u8>,
    pub firmware: Firmware,
    pub pages: Arc<PageBuffer>,
    pub ranges: Vec<PageRange>,
    /// Its disk, from the template's layer upwards.
    pub layers: Vec<PathBuf>,
}

impl Saved {
    pub async fn of(machine: &Arc<dyn Machine>, layers: Vec<PathBuf>) -> Saved {
        let mut saved = machine.save_delta().await.unwrap();
        assert_eq!(*machine.run_state().borrow(), RunState::Stopped);
        let pages = PageBuffer::collect(&mut saved.pages).unwrap();
        println!(
            "saved: {:?}, state {} bytes, {} pages in {} ranges, of which {} zero",
            saved.times,
            saved.state.len(),
            saved.pages.count(),
            saved.pages.ranges().len(),
            pages.zero_pages(),
        );
        assert_eq!(
            pages.data_bytes() / 4096 + pages.zero_pages(),
            saved.pages.count()
        );
        Saved {
            state: saved.state,
            firmware: saved.firmware,
            ranges: saved.pages.ranges().to_vec(),
            pages: Arc::new(pages),
            layers,
        }
    }

    pub fn delta(&self) -> Delta {
        Delta {
            firmware: self.firmware.clone(),
            pages: self.pages.stream(),
        }
    }

    pub async fn restore(
        &self,
        template: &Template,
        vmm: &QemuVmm,
        dir: &Path,
        uid: u32,
        id: &str,
        delta: Delta,
    ) -> Result<Arc<dyn Machine>, VmmError> {
        let mut spec = template.clone_spec(vmm, dir, uid, id);
        spec.machine.disk.layers = qcow2(&self.layers);
        spec.state = state_file(&self.state).unwrap();
        vmm.restore_delta(spec, delta).await
    }

    /// Either way, when nothing is wrong.
    pub async fn come_back(
        &self,
        standby: bool,
        template: &Template,
        vmm: &QemuVmm,
        dir: &Path,
        uid: u32,
        id: &str,
    ) -> Arc<dyn Machine> {
        let machine = match standby {
            true => self.restore_standby(template, vmm, dir, uid, id).await,
            false => {
                let delta = self.delta();
                self.restore(template, vmm, dir, uid, id, delta).await
            }
        };
        machine.unwrap()
    }

    /// The same with a monitor that stood by.
    pub async fn restore_standby(
        &self,
        template: &Template,
        vmm: &QemuVmm,
        dir: &Path,
        uid: u32,
        id: &str,
    ) -> Result<Arc<dyn Machine>, VmmError> {
        let spec = template.clone_spec(vmm, dir, uid, id);
        let machine = vmm.stand_by(spec.machine, spec.memory.clone()).await?;
        assert_eq!(*machine.run_state().borrow(), RunState::Stopped);
        let load = LoadSpec {
            layers: self.layers[1..].to_vec(),
            memory: spec.memory,
            state: state_file(&self.state).unwrap(),
            delta: Some(self.delta()),
        };
        let loaded = machine.load(load).await;
        if loaded.is_err() {
            machine.kill().await.unwrap();
        }
        loaded.map(|()| machine)
    }
}
