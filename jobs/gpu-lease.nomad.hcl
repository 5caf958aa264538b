# Holds the GPUs that the engines take turns on, so that Nomad gives them to nobody else.
#
# The one job with a device block. It runs nothing; stop it before the GPUs go to other work.

variable "job_id" { type = string }
variable "namespace" { type = string }
variable "node_pool" { type = string }
variable "node" { type = string }
variable "image" { type = string } # any image whose entry point sleeps, by digest: Nomad's own pause image will do
variable "gpu_uuids" { type = list(string) }

job "gpu-lease" {
  id          = var.job_id
  name        = var.job_id
  namespace   = var.namespace
  type        = "service"
  node_pool   = var.node_pool
  datacenters = ["*"]
  priority    = 90 # placed before other work that wants GPUs

  meta = {
    role = "gpu-lease"
  }

  constraint {
    attribute = "${node.unique.name}"
    value     = var.node
  }

  group "lease" {
    count = 1

    # It must come back whenever the node does.
    restart {
      attempts = 10
      interval = "10m"
      delay    = "15s"
      mode     = "delay"
    }

    ephemeral_disk {
      size = 110
    }

    task "hold" {
      driver = "docker"

      config {
        image           = var.image
        network_mode    = "none"
        readonly_rootfs = true
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
      }

      logs {
        max_files     = 1
        max_file_size = 10
      }

      resources {
        cpu    = 10
        memory = 32

        device "nvidia/gpu" {
          count = length(var.gpu_uuids)

          # These and no others: the engines name them.
          constraint {
            attribute = "${device.ids}"
            operator  = "set_contains"
            value     = join(",", var.gpu_uuids)
          }
        }
      }
    }
  }
}
