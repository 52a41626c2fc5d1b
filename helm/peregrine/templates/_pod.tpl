{{- define "peregrine.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser }}
runAsGroup: {{ .Values.security.runAsGroup }}
fsGroup: {{ .Values.security.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "peregrine.securityContext" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser }}
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* The parts of a pod's spec that head, workers, job and test share. */}}
{{- define "peregrine.podBasics" -}}
serviceAccountName: {{ include "peregrine.serviceAccountName" . }}
securityContext: {{- include "peregrine.podSecurityContext" . | nindent 2 }}
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "peregrine.container" -}}
image: {{ include "peregrine.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext: {{- include "peregrine.securityContext" . | nindent 2 }}
{{- end }}

{{/* Which secrets a node's container sees, and where its configuration lies. */}}
{{- define "peregrine.nodeEnv" -}}
- {name: PEREGRINE_CONFIG, value: /etc/peregrine/peregrine.yaml}
- {name: RAY_START_ULIMIT_OPEN_FILES, value: "65536"}
{{- with .Values.auth.existingSecret }}
- name: PEREGRINE_API_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.auth.key }}}}
{{- end }}
{{- with .Values.otlp.existingSecret }}
- name: OTEL_EXPORTER_OTLP_HEADERS
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.otlp.key }}}}
{{- end }}
{{- if include "peregrine.isPrefetched" . }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- else }}
{{- include "peregrine.hubToken" . | nindent 0 }}
{{- end }}
{{- end }}

{{- define "peregrine.hubToken" -}}
{{- with .Values.huggingface.existingSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.huggingface.key }}}}
{{- end }}
{{- end }}

{{- define "peregrine.nodeVolumeMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
- {name: config, mountPath: /etc/peregrine, readOnly: true}
- {name: cache, mountPath: /cache}
{{- if .Values.tenants.existingSecret }}
- {name: tenants, mountPath: /etc/peregrine-tenants, readOnly: true}
{{- end }}
{{- end }}

{{- define "peregrine.nodeVolumes" -}}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.ray.tmpSizeLimit }}}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ add .Values.ray.objectStoreBytes 67108864 | quote }}}
- name: config
  configMap: {name: {{ include "peregrine.fullname" . }}}
{{- with .Values.tenants.existingSecret }}
- name: tenants # a volume and no variable: it follows the secret
  secret: {secretName: {{ . }}}
{{- end }}
{{- end }}

{{- define "peregrine.cacheVolume" -}}
- name: cache
{{- if .Values.modelCache.enabled }}
  persistentVolumeClaim: {claimName: {{ .Values.modelCache.existingClaim | default (printf "%s-models" (include "peregrine.fullname" .)) }}}
{{- else }}
  emptyDir: {}
{{- end }}
{{- end }}

{{/* Of Ray's agent on this node, without a token: what KubeRay itself asks. */}}
{{- define "peregrine.nodeHealth" -}}
httpGet: {path: /api/healthz, port: 52365}
{{- end }}

{{/* Written by the prefetch job once its model is whole. */}}
{{- define "peregrine.modelMark" -}}
/cache/ready/{{ toJson (list .Values.config.engine.model .Values.modelCache.quantize) | sha256sum | trunc 16 }}
{{- end }}

{{- define "peregrine.podAnnotations" -}}
# A new value is a new cluster, which is how a changed configuration comes without a gap.
peregrine/config: {{ include "peregrine.configChecksum" . | quote }}
{{- with .Values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* One GPU, whatever the values say of the rest. */}}
{{- define "peregrine.workerResources" -}}
{{- $resources := deepCopy .Values.worker.resources }}
{{- if include "peregrine.isOnGpu" . }}
{{- $_ := set $resources "limits" (set ($resources.limits | default dict) .Values.worker.gpu.resource 1) }}
{{- $_ := set $resources "requests" (set ($resources.requests | default dict) .Values.worker.gpu.resource 1) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}
