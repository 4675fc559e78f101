//! New versions of applications when what is below them is newer: the image, or an addon (ams-model section 2.3,
//! `application.auto_update`). What a version stands on is `catalog`'s to know; when to look is known here.

use std::{sync::Arc, time::Duration};

use fanlight_service::telemetry::chain;
use tokio::{sync::Notify, time::timeout};

use crate::{
    Ams,
    catalog::{Below, CatalogError},
    core::model::key,
    settings,
};

/// What is changed together comes within this time.
const PAUSE: Duration = Duration::from_millis(300);
/// How often to look though nothing was told: what became ours with the end of another unit.
const ROUND: Duration = Duration::from_secs(600);

impl Ams {
    /// Looks after every change of images, addons and settings, for ever.
    pub(crate) async fn keep_applications_new(self) {
        if !self.engine.has_images() {
            return;
        }
        let news = Arc::new(Notify::new());
        for prefix in [key::IMAGES, key::DEFAULT_IMAGE, key::ADDONS, settings::PREFIX] {
            let (ams, news) = (self.clone(), news.clone());
            self.shutdown.spawn_until_stopped("updates-told", async move {
                while let Some(mut told) = ams.watch_again(prefix).await {
                    while told.next().await.is_some() {
                        news.notify_one();
                    }
                }
            });
        }
        loop {
            let _ = timeout(ROUND, news.notified()).await;
            tokio::time::sleep(PAUSE).await;
            if !self.settings.get().auto_update {
                continue;
            }
            let applications = match self.catalog.list().await {
                Ok(applications) => applications,
                Err(error) => {
                    tracing::warn!("looking for newer images and addons: {}", chain(&error));
                    continue;
                }
            };
            for application in applications {
                if application.inhibit_auto_updates || !self.is_ours(application.id.as_str()) {
                    continue;
                }
                if let Err(error) = self.renew_if_behind(application.id.as_str()).await {
                    tracing::warn!("updating application {}: {}", application.name, chain(&error));
                }
            }
        }
    }

    async fn renew_if_behind(&self, id: &str) -> Result<(), CatalogError> {
        let made = match self.catalog.is_behind(id).await {
            Ok(true) => self.catalog.renew(id, &Below::default()).await,
            Ok(false) => return Ok(()),
            Err(error) => Err(error),
        };
        match made {
            Ok(operation) => Ok(self.make_new_versions(&operation).await?),
            // Deleted, or updated by somebody else, meanwhile.
            Err(CatalogError::NotFound | CatalogError::Overtaken) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
